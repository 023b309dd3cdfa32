package local_test

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/domain/domaintest"
	"github.com/entente-mesh/entente/ca/local"
)

const (
	td   = "banking.example"
	peer = "trading.example"
)

var now = time.Unix(1_800_000_000, 0)

// world is an agreed state, in which node n1 has authorities.
type world struct {
	*testing.T
	*domain.State
	index uint64
}

func newWorld(t *testing.T) *world {
	w := &world{T: t, State: domain.New()}
	w.agree(&statev1.Command{Body: &statev1.Command_Init{Init: &statev1.Init{
		Cluster: &statev1.Cluster{TrustDomain: td, Id: bytes.Repeat([]byte{1}, ca.ClusterIDSize)},
		Member: &statev1.Member{Id: domaintest.KeyID("n1"), Name: "n1", Datacenter: "dc1", Voter: true, Signing: true, FeatureLevel: domain.FeatureLevel,
			RaftAddress: "127.0.0.1:1", ApiAddress: "127.0.0.1:2"},
	}}})
	w.agree(&statev1.Command{Body: &statev1.Command_Tick{Tick: &statev1.Tick{UnixNanos: []int64{now.UnixNano()}}}})
	return w
}

func (w *world) agree(cmd *statev1.Command) {
	w.Helper()
	w.index++
	if out := w.Apply(w.index, cmd); out.Refused != nil || out.Fatal != nil {
		w.Fatalf("%T: %v, %v", cmd.GetBody(), out.Refused, out.Fatal)
	}
}

func (w *world) prepare(name string) *statev1.Authority {
	a := domaintest.Authority("n1", name, td, statev1.KeyUse_KEY_USE_X509, now, w.Lifetimes().Phase)
	w.agree(domaintest.Prepare(w.Cluster(), a))
	return a
}

func (w *world) ready(id string) {
	w.agree(&statev1.Command{Body: &statev1.Command_AuthorityReady{AuthorityReady: &statev1.AuthorityReady{Id: id}}})
}

func (w *world) activate(id string) {
	w.agree(&statev1.Command{Body: &statev1.Command_ActivateAuthority{ActivateAuthority: &statev1.ActivateAuthority{Id: id}}})
}

// An authority that was taken into use without quorum signs until the state says otherwise.
func TestSigning(t *testing.T) {
	w := newWorld(t)
	node, use := domaintest.KeyID("n1"), statev1.KeyUse_KEY_USE_X509
	first := w.prepare("first")
	w.ready(first.GetId())
	w.activate(first.GetId())
	second := w.prepare("second")
	var v local.View
	if got := v.Signing(w.State, node, use); got.GetId() != first.GetId() {
		t.Errorf("by agreement %.8s signs", got.GetId())
	}
	v = v.WithAuthority(second)
	if got := v.Signing(w.State, node, use); got.GetId() != first.GetId() {
		t.Errorf("%.8s signs, which not everybody holds", got.GetId())
	}
	w.ready(second.GetId())
	if got := v.Signing(w.State, node, use); got.GetId() != second.GetId() || got.GetPhase() != statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE {
		t.Errorf("%.8s signs, %v", got.GetId(), got.GetPhase())
	}
	if got := v.Signing(w.State, node, statev1.KeyUse_KEY_USE_JWT); got != nil {
		t.Errorf("for tokens %.8s signs", got.GetId())
	}
	if !v.Took(second.GetId()) || v.Took(first.GetId()) || v.Taken(use) != second.GetId() || v.Offline() != 1 {
		t.Error("it does not say what it took")
	}
	without := v.WithoutAuthority(use)
	if without.Offline() != 0 || v.Offline() != 1 {
		t.Error("a view was changed, or nothing was given up")
	}
	w.agree(&statev1.Command{Body: &statev1.Command_TaintAuthority{TaintAuthority: &statev1.TaintAuthority{Id: second.GetId()}}})
	if got := v.Signing(w.State, node, use); got.GetId() != first.GetId() {
		t.Errorf("%.8s signs, which the cluster has given up", got.GetId())
	}
}

// The newer of two bundles counts, the agreed one and the one held here; what is agreed, or
// of a domain without a relationship, is given up.
func TestForeign(t *testing.T) {
	w := newWorld(t)
	relationship := func() *statev1.Command {
		return &statev1.Command{Body: &statev1.Command_ApplyObjects{ApplyObjects: &statev1.ApplyObjects{Upserts: []*statev1.Object{
			{Kind: &statev1.Object_Relationship{Relationship: &statev1.Relationship{TrustDomain: peer}}}}}}}
	}
	w.agree(relationship())
	bundle := func(sequence uint64) *statev1.ForeignBundle {
		return &statev1.ForeignBundle{TrustDomain: peer, Sequence: sequence, Jwks: domaintest.Bundle(sequence, domaintest.BundleKey{Name: "theirs", Names: peer, Use: statev1.KeyUse_KEY_USE_X509})}
	}
	var v local.View
	if got := v.Newest(w.State, peer); got != nil {
		t.Errorf("before any: %v", got)
	}
	v = v.WithForeign(bundle(3))
	if got := v.Newest(w.State, peer); got.GetSequence() != 3 || len(v.Settled(w.State)) != 0 {
		t.Errorf("newest %d, settled %v", got.GetSequence(), v.Settled(w.State))
	}
	for sequence, settled := range []bool{2: false, 3: true, 4: true} {
		if sequence < 2 {
			continue
		}
		w.agree(&statev1.Command{Body: &statev1.Command_StoreForeignBundle{StoreForeignBundle: &statev1.StoreForeignBundle{
			TrustDomain: peer, Jwks: bundle(uint64(sequence)).GetJwks(), Sequence: uint64(sequence)}}})
		if got := v.Newest(w.State, peer); got.GetSequence() != uint64(max(3, sequence)) || slices.Contains(v.Settled(w.State), peer) != settled {
			t.Errorf("agreed %d: newest %d, settled %v", sequence, got.GetSequence(), v.Settled(w.State))
		}
	}
	if left := v.WithoutForeign([]string{peer}); len(left.Foreign()) != 0 || len(v.Foreign()) != 1 {
		t.Error("a view was changed, or nothing was given up")
	}
	stranger := local.View{}.WithForeign(&statev1.ForeignBundle{TrustDomain: "stranger.example", Sequence: 9})
	if got := stranger.Settled(w.State); !slices.Equal(got, []string{"stranger.example"}) {
		t.Errorf("settled %v", got)
	}
}

// Memory of bans and state are compared in both directions.
func TestCompareBans(t *testing.T) {
	w := newWorld(t)
	admit := func(name, key string) {
		w.agree(&statev1.Command{Body: &statev1.Command_AdmitAgent{AdmitAgent: &statev1.AdmitAgent{Agent: &statev1.Agent{
			Name: name, KeyId: domaintest.KeyID(key), Datacenter: "dc1", Addresses: []string{"h1.example"}, Certificate: domaintest.KeyID("certificate " + key), Selectors: []string{"x509pop:subject:cn:" + name}}}}})
	}
	ban := func(name string) {
		w.agree(&statev1.Command{Body: &statev1.Command_BanAgent{BanAgent: &statev1.BanAgent{Name: name}}})
	}
	names := func(list []local.Ban) (text string) {
		for _, b := range list {
			text += b.Kind + " " + b.Agent + " "
		}
		return strings.TrimSpace(text)
	}
	expect := func(what string, v local.View, news, pending, isolated string) {
		t.Helper()
		gotNews, gotPending := v.Compare(w.State, now)
		var list []string
		for _, p := range gotPending {
			list = append(list, p.GetAgent().GetName())
		}
		if names(gotNews) != news || strings.Join(list, " ") != pending || names(v.Isolated(w.State)) != isolated {
			t.Errorf("%s: news %q, pending %q, isolated %q", what, names(gotNews), list, names(v.Isolated(w.State)))
		}
	}
	for _, name := range []string{"h1", "h2", "h3"} {
		admit(name, name)
	}
	record := func(kind, name string) local.Ban {
		a, _ := w.Agent(name)
		return local.NewBan(kind, w.State, a, now)
	}
	expect("nothing", local.View{}, "", "", "")
	alone := local.View{Bans: []local.Ban{record(local.Isolated, "h1")}}
	expect("isolated by this node", alone, "", "h1", "isolated h1")
	ban("h1")
	expect("and then agreed", alone, "banned h1", "", "")
	expect("agreed only", local.View{}, "banned h1", "", "")
	remembered := local.View{Bans: []local.Ban{record(local.Banned, "h1")}}
	expect("agreed and remembered", remembered, "", "", "")
	w.agree(&statev1.Command{Body: &statev1.Command_EvictAgent{EvictAgent: &statev1.EvictAgent{Name: "h1"}}})
	expect("evicted", remembered, "lifted h1", "", "")
	admit("h1", "another key")
	expect("attested anew", remembered, "lifted h1", "", "")
	ahead := record(local.Banned, "h2")
	ahead.Revision = w.Revision() + 1
	expect("a replica that has to catch up", local.View{Bans: []local.Ban{ahead}}, "", "", "")
	other := record(local.Isolated, "h3")
	other.Cluster = "00"
	expect("of another cluster", local.View{Bans: []local.Ban{other}}, "", "", "")
	if err := record(local.Banned, "h3").Check(); err != nil {
		t.Error(err)
	}
	if odd := (local.Ban{Kind: "forgiven", Agent: "h1", Datacenter: "dc1", KeyID: domaintest.KeyID("h1")}); odd.Check() == nil {
		t.Error("a ban of no kind passed")
	}
}
