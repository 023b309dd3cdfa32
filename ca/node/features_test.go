package node_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/node"
)

// A rolling upgrade: while one member runs the release before, what that one does not
// know is refused and everything else goes on; when it is upgraded it says so by itself.
func TestMixedReleases(t *testing.T) {
	t.Parallel()
	ca1 := catest.Prepare(t, catest.Options{Name: "ca-1"})
	ca1.Config().PretendLevel(1) // the whole cluster began with the release before
	if err := node.Init(ca1.Config(), ca1.KeepRecoveryKey); err != nil {
		t.Fatal(err)
	}
	ca1.Restart()
	ca1.WaitReady()
	ca2 := catest.Prepare(t, catest.Options{Name: "ca-2"})
	ca2.Config().PretendLevel(1)
	if err := node.Join(t.Context(), ca2.Config(), ca1.NodeToken("ca-2", "dc1")); err != nil {
		t.Fatal(err)
	}
	ca2.Restart()
	ca2.WaitReady()

	large := func(port uint32) error {
		req := &ententev1.ApplyRequest{}
		for i := range 600 {
			name := fmt.Sprintf("service-%d", i)
			req.Objects = append(req.Objects, &statev1.Object{Source: "banking.yaml:1", Kind: &statev1.Object_Service{Service: &statev1.Service{
				Name: name, Path: "/" + name, Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1000", "unix:path:/opt/" + strings.Repeat("x", 60)}, Port: port,
			}}})
		}
		_, err := ca2.Admin().Apply(t.Context(), req)
		return err
	}
	refused := func(behind string) error {
		switch err := large(1); {
		case status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), behind):
			return fmt.Errorf("%w: does not say that %s", err, behind)
		case ca2.Status().GetEntries() != 0:
			return errors.New("something was changed")
		}
		return nil
	}
	if err := refused("ca-1, ca-2 are behind"); err != nil {
		t.Fatal(err)
	}
	ca2.Apply(accounts) // what the release before knows
	// Its doors took entries by a digest alone.
	weak := &statev1.Entry{Id: "entry/weak", Path: "/weak", Hosts: []string{"h1"}, Selectors: []string{"unix:sha256:" + strings.Repeat("a", 64)}}
	change := func(c *statev1.EntryChange, weak uint32) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		_, err := ca1.Node().Propose(ctx, &statev1.Command{Actor: "operator", Body: &statev1.Command_ChangeEntries{ChangeEntries: &statev1.ChangeEntries{Changes: []*statev1.EntryChange{c}}}})
		if got := ca1.Status().GetWeakEntries(); err != nil || got != weak {
			t.Errorf("%d weak entries, want %d: %v", got, weak, err)
		}
	}
	change(&statev1.EntryChange{Action: &statev1.EntryChange_Create{Create: weak}}, 1)
	change(&statev1.EntryChange{Action: &statev1.EntryChange_Delete{Delete: weak.GetId()}}, 0)

	ca2.Stop()
	ca2.Config().PretendLevel(0)
	ca2.Restart()
	ca2.WaitReady()
	_, err := ca2.Admin().Apply(t.Context(), &ententev1.ApplyRequest{Deletes: []*statev1.ObjectKey{{Kind: "Service", Name: "accounts"}}})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "only ca-1 is behind", 10*time.Second, func() error { return refused("ca-1 is behind") })

	ca1.Stop()
	ca1.Config().PretendLevel(0)
	ca1.Restart()
	ca1.WaitReady()
	eventually(t, "a change larger than a log entry", 20*time.Second, func() error { return large(1) })
	if n := ca2.Status().GetEntries(); n != 600 {
		t.Errorf("%d entries", n)
	}
	// What cannot be cut is refused by name.
	req := &ententev1.ApplyRequest{Objects: []*statev1.Object{{Source: "banking.yaml:9", Kind: &statev1.Object_Service{Service: &statev1.Service{
		Name: "huge", Path: "/huge", Hosts: many("a-host-in-datacenter-1-%d", 2500), Selectors: []string{"unix:uid:1000"},
	}}}}}
	if _, err := ca2.Admin().Apply(t.Context(), req); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "Service/huge has") {
		t.Errorf("an object that no log entry holds: %v", err)
	}
}

func many(format string, n int) (list []string) {
	for i := range n {
		list = append(list, fmt.Sprintf(format, i))
	}
	return list
}
