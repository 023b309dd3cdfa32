package server_test

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/feed"
	"github.com/entente-mesh/entente/ca/server"
)

// What a member says of its sessions costs no more than what agreed agents can have, and a
// few megabytes: neither long rows, nor many, nor what this node does not know.
func TestMembersWordIsBounded(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	attest(t, c, "h2", "127.0.0.1")
	hear := func() (*server.Hearsay, *feed.Feed) {
		f := feed.New("this", 0, 0)
		return server.New(server.Config{State: c.Node(), Feed: f}).Hear("other"), f
	}
	session := func(name string) *ententev1.Instance {
		return &ententev1.Instance{Agent: name, BootId: "b", Connect: 1}
	}
	ledger := func() *ententev1.Instance {
		return &ententev1.Instance{Agent: "h2", BootId: "b", Connect: 1, Service: "ledger", Address: "127.0.0.1:7443"}
	}
	gateway := ca.GatewayEntry("gw-1") + "@h2"
	hold := func(t *testing.T, h *server.Hearsay, most int) {
		t.Helper()
		if n := h.Held(); n > most {
			t.Errorf("%d bytes are kept", n)
		}
	}

	t.Run("control", func(t *testing.T) {
		h, f := hear()
		if err := h.Take(&ententev1.PresenceResponse{Instances: []*ententev1.Instance{session("h2"), ledger(), session(gateway)}, Complete: true}); err != nil {
			t.Fatal(err)
		}
		if got := f.Instances(); len(got) != 1 || got[0].Address != "127.0.0.1:7443" {
			t.Errorf("shown %v", got)
		}
		hold(t, h, 0)
	})
	t.Run("long rows", func(t *testing.T) {
		h, f := hear()
		long := strings.Repeat("x", 1<<20)
		for i := range 20 {
			for _, name := range []string{"h2", gateway, fmt.Sprint("nobody-", i), long} {
				padded, proved, unknown, far := session(name), session(name), session(name), ledger()
				padded.Datacenter = long
				proved.Proof = &ententev1.SessionProof{PublicKey: []byte(long), Signature: []byte(long)}
				unknown.ProtoReflect().SetUnknown(protowire.AppendString(protowire.AppendTag(nil, 5000, protowire.BytesType), long))
				far.Datacenter = long
				if err := h.Take(&ententev1.PresenceResponse{Instances: []*ententev1.Instance{padded, proved, unknown, session(name), far}, Complete: i > 10}); err != nil {
					t.Fatal(err)
				}
				hold(t, h, 4<<10)
			}
		}
		if got := f.Instances(); len(got) != 0 {
			t.Errorf("shown %v", got)
		}
	})
	t.Run("many unknown agents", func(t *testing.T) {
		h, f := hear()
		for i := range 19_000 {
			unknown := session(fmt.Sprint("nobody-", i))
			unknown.Datacenter = strings.Repeat("x", 1000)
			if err := h.Take(&ententev1.PresenceResponse{Instances: []*ententev1.Instance{unknown}}); err != nil {
				t.Fatal(err)
			}
		}
		hold(t, h, 8<<20)
		if h.Held() < 7<<20 {
			t.Errorf("only %d bytes are kept for when this node knows them", h.Held())
		}
		if err := h.Take(&ententev1.PresenceResponse{Instances: []*ententev1.Instance{session("h2"), ledger()}, Complete: true}); err != nil || len(f.Instances()) != 1 {
			t.Errorf("who is known beside them is not heard: %v", err)
		}
		hold(t, h, 8<<20)
	})
	t.Run("many rows", func(t *testing.T) {
		h, _ := hear()
		chunk := &ententev1.PresenceResponse{}
		for range 1000 {
			chunk.Instances = append(chunk.Instances, session("h2"))
		}
		for i := range 100 {
			err := h.Take(chunk)
			if (err != nil) != (i >= 20) {
				t.Fatalf("after %d rows: %v", 1000*(i+1), err)
			}
			if err != nil {
				return
			}
		}
		t.Error("a set without end is read on")
	})
}
