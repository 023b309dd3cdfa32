package feed

import (
	"slices"
	"testing"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// Whatever ends trust reaches every subscriber, whomever it names: ahead, and in its
// place in the policy lane, at the same revision.
func TestEndOfTrustReachesEverySubscriber(t *testing.T) {
	for _, test := range []struct {
		name string
		do   func(w *world, authority string) *statev1.Command
		item string // id of the distrust item; empty: the authority is tainted
	}{
		{"ban", func(*world, string) *statev1.Command {
			return &statev1.Command{Body: &statev1.Command_BanAgent{BanAgent: &statev1.BanAgent{Name: "h3"}}}
		}, "agent/h3"},
		{"evict", func(*world, string) *statev1.Command {
			return &statev1.Command{Body: &statev1.Command_EvictAgent{EvictAgent: &statev1.EvictAgent{Name: "h3"}}}
		}, "agent/h3"},
		{"merged ban", func(w *world, _ string) *statev1.Command {
			h3, _ := w.st.Agent("h3")
			return &statev1.Command{Body: &statev1.Command_MergeBans{MergeBans: &statev1.MergeBans{Bans: []*statev1.RememberedBan{{Agent: h3}}}}}
		}, "agent/h3"},
		{"entry deleted", func(*world, string) *statev1.Command {
			return &statev1.Command{Body: &statev1.Command_ChangeEntries{ChangeEntries: &statev1.ChangeEntries{Changes: []*statev1.EntryChange{
				{Action: &statev1.EntryChange_Delete{Delete: "entry/job"}},
			}}}}
		}, "entry/entry/job"},
		{"service deleted", func(*world, string) *statev1.Command {
			return &statev1.Command{Body: &statev1.Command_ApplyObjects{ApplyObjects: &statev1.ApplyObjects{
				Deletes: []*statev1.ObjectKey{{Kind: "Service", Name: "accounts"}},
			}}}
		}, "entry/service/accounts"},
		{"taint", func(_ *world, id string) *statev1.Command {
			return &statev1.Command{Body: &statev1.Command_TaintAuthority{TaintAuthority: &statev1.TaintAuthority{Id: id}}}
		}, ""},
		{"revoke", func(_ *world, id string) *statev1.Command {
			return &statev1.Command{Body: &statev1.Command_RevokeAuthority{RevokeAuthority: &statev1.RevokeAuthority{Id: id, Now: true}}}
		}, "authority/"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t, 0)
			for _, host := range []string{"h1", "h2", "h3"} {
				w.attest(host)
			}
			w.apply(service("accounts", "h3"), gateway("gw-1", "h2"))
			w.must(&statev1.Command{Body: &statev1.Command_ChangeEntries{ChangeEntries: &statev1.ChangeEntries{Changes: []*statev1.EntryChange{
				{Action: &statev1.EntryChange_Create{Create: &statev1.Entry{Id: "entry/job", Path: "/job", Hosts: []string{"h3"}, Selectors: []string{"unix:uid:1"}}}},
			}}}})
			authority := w.authority("a1").GetId()
			// h1 has nothing to do with any of it.
			subscribers := map[string]*Session{
				"h1": w.subscribe(agentSub("h1", 1), 0), "h2": w.subscribe(agentSub("h2", 1), 0), "gw-1": w.subscribe(gatewaySub("gw-1", "h2"), 0),
			}
			for _, s := range subscribers {
				w.drain(s, &mirror{})
				for len(s.Wake) > 0 {
					<-s.Wake
				}
				if u, ok := s.Urgent(w.st); ok {
					t.Fatalf("control: urgent before: %+v", u)
				}
			}
			want := test.item
			if want == "authority/" {
				want += authority
			}
			w.must(test.do(w, authority))
			names := func(items []*statev1.Distrust) bool {
				return slices.ContainsFunc(items, func(d *statev1.Distrust) bool { return d.GetId() == want })
			}
			for name, s := range subscribers {
				if len(s.Wake) == 0 {
					t.Errorf("%s is not woken", name)
				}
				u, ok := s.Urgent(w.st)
				p, has, err := s.Policy(w.st)
				switch {
				case !ok || !has || err != nil:
					t.Errorf("%s: ahead %v, policy %v, %v", name, ok, has, err)
				case want != "" && (!names(u.Distrust) || !names(p.Distrust)):
					t.Errorf("%s: ahead %v, policy %v", name, u.Distrust, p.Distrust)
				case want == "" && (!slices.Contains(u.Tainted, authority) || !p.TaintedChanged || !slices.Contains(p.Tainted, authority)):
					t.Errorf("%s: ahead %v, policy %v", name, u.Tainted, p.Tainted)
				case p.Revision != w.st.Revision():
					t.Errorf("%s: policy at %d, the state is at %d", name, p.Revision, w.st.Revision())
				}
			}
		})
	}
}
