package client

import (
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
)

func newClient(t *testing.T) *Client {
	t.Helper()
	c, err := New(Config{TrustDomain: bank, Addresses: []string{"127.0.0.1:1"}})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// What a former process held is what a later one resumes with; its instances are
// nobody's word for now.
func TestPicture(t *testing.T) {
	before := newClient(t)
	if kept, err := before.Picture(); kept != nil || err != nil {
		t.Fatalf("nothing was received, and it kept %d bytes (%v)", len(kept), err)
	}
	p := full(5, "a", "b")
	p.Distrust = []*statev1.Distrust{{Id: "authority/x", Authority: "x"}}
	p.Tainted, p.TaintedChanged, p.ReissueWithinMs = []string{"y"}, true, 1500
	p.Objects = []*statev1.Object{{Kind: &statev1.Object_Service{Service: &statev1.Service{Name: "a"}}}}
	before.store.attach("m")
	if err := before.store.policy(p); err != nil {
		t.Fatal(err)
	}
	before.store.presence(&ententev1.Presence{Complete: true, Instances: []*ententev1.Instance{{Service: "a", Agent: "h1", Datacenter: "dc1", Address: "127.0.0.1:2", Health: ententev1.Health_HEALTH_HEALTHY}}})
	kept, err := before.Picture()
	if err != nil {
		t.Fatal(err)
	}

	after := newClient(t)
	if err := after.Recall(kept); err != nil {
		t.Fatal(err)
	}
	view := after.View()
	if held(after.store) != "a b" || view.Revision != 5 || after.store.attach("m") != 5 || len(view.Objects) != 1 || len(view.Members) != 1 || len(view.Bundles) != 1 || view.Cluster == nil {
		t.Errorf("%+v", view)
	}
	if len(view.Tainted) != 1 || view.ReissueWithin != 1500*time.Millisecond || !reflect.DeepEqual(view.Distrust, ca.NewDistrusted(bank, p.Distrust)) {
		t.Errorf("%v within %v, %v", view.Tainted, view.ReissueWithin, view.Distrust)
	}
	if len(view.Instances) != 1 || !view.Instances[0].Stale || !view.Instances[0].Healthy {
		t.Errorf("instances %+v", view.Instances)
	}
	if err := after.store.policy(&ententev1.Policy{Last: true, Revision: 6, Entries: entries("c")}); err != nil || held(after.store) != "a b c" {
		t.Errorf("a delta does not fit: %v", err)
	}
}

func TestRecallRefuses(t *testing.T) {
	foreign := full(5, "a")
	foreign.Cluster = cluster("trading.example", 1)
	part := full(5, "a")
	part.Last = false
	pictures := map[string]*ententev1.Policy{"other trust domain": foreign, "part of a state": part, "a delta": &ententev1.Policy{Last: true, Revision: 5, Entries: entries("a")}}
	for name, policy := range pictures {
		data, err := proto.Marshal(&ententev1.Picture{Policy: policy})
		if err != nil {
			t.Fatal(err)
		}
		c := newClient(t)
		if err := c.Recall(data); err == nil || c.View().Revision != 0 {
			t.Errorf("%s: %v, revision %d", name, err, c.View().Revision)
		}
	}
	if err := newClient(t).Recall([]byte(strings.Repeat("\xff", 40))); err == nil || errors.Is(err, errRefused) {
		t.Errorf("garbage: %v", err)
	}
}
