package server_test

import (
	"crypto/rand"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
)

// authorityOf makes a signing authority as a member would.
func authorityOf(t *testing.T, td, memberID string, phase time.Duration) *statev1.Authority {
	t.Helper()
	key := newKey(t)
	template, err := ca.AuthorityTemplate(ca.AuthorityRequest{
		TrustDomain: spiffeid.RequireTrustDomainFromString(td), PublicKey: key.Public(), Serial: [16]byte([]byte(rand.Text())), Now: time.Now(), Phase: phase,
	})
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return &statev1.Authority{
		Id: ca.KeyID(spki), MemberId: memberID, Use: statev1.KeyUse_KEY_USE_X509, PublicKey: spki, Certificate: der,
		NotBefore: template.NotBefore.Unix(), NotAfter: template.NotAfter.Unix(), Phase: statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED,
	}
}

// Whoever stole a member's node key speaks for that member through the forwarding door:
// not for another one, not for another domain, not for longer than an authority lives;
// and what it asks for in an operator's name stands in the log under the member's id.
func TestStolenNodeKey(t *testing.T) {
	t.Parallel()
	v := newVictim(t)
	two := v.Join("ca-2", "dc2")
	leader, stolen := v.CA, two
	if two.Node().IsLeader() {
		leader, stolen = two, v.CA
	}
	id := stolen.Node().ID()
	cert := memberCertificate(t, stolen)
	door := ententev1.NewPeerClient(dial(t, leader, &cert))
	propose := func(actor string, command *statev1.Command) error {
		t.Helper()
		command.Actor = actor
		data, err := proto.Marshal(command)
		if err != nil {
			t.Fatal(err)
		}
		_, err = door.Propose(t.Context(), &ententev1.ProposeRequest{Command: data})
		return err
	}
	prepare := func(a *statev1.Authority) error {
		t.Helper()
		return propose("CA node "+stolen.Config().Name, &statev1.Command{Body: &statev1.Command_PrepareAuthority{PrepareAuthority: &statev1.PrepareAuthority{Authority: a}}})
	}
	const domainName, phase = "banking.example", 48 * time.Hour
	altered := authorityOf(t, domainName, id, phase)
	altered.NotAfter += 3600
	other := authorityOf(t, domainName, id, phase)
	swapped := authorityOf(t, domainName, id, phase)
	swapped.PublicKey, swapped.Id = other.PublicKey, other.Id
	active := authorityOf(t, domainName, id, phase)
	active.Phase, active.Ready = statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE, true
	for what, a := range map[string]*statev1.Authority{
		"for another node":                          authorityOf(t, domainName, leader.Node().ID(), phase),
		"for another domain":                        authorityOf(t, "trading.example", id, phase),
		"with too long a life":                      authorityOf(t, domainName, id, 10*phase),
		"with another end than its certificate's":   altered,
		"with another key than its certificate's":   swapped,
		"that signs at once, as nobody has seen it": active,
	} {
		wantCode(t, "an authority "+what, prepare(a), codes.PermissionDenied)
	}
	before := len(leader.Status().GetAuthorities())
	if err := prepare(authorityOf(t, domainName, id, phase)); err != nil && !strings.Contains(err.Error(), "PREPARED") {
		t.Errorf("control: an authority of its own: %v", err)
	}
	t.Logf("authorities: %d, then %d", before, len(leader.Status().GetAuthorities()))

	// An operator's acts need one who asked.
	ban := func() *statev1.Command {
		return &statev1.Command{Body: &statev1.Command_BanAgent{BanAgent: &statev1.BanAgent{Name: "h1"}}}
	}
	attest(t, leader, "h2")
	for what, actor := range map[string]string{"nobody": "", "the node itself": "CA node " + stolen.Config().Name, "somebody with a long name": strings.Repeat("x", 300)} {
		wantCode(t, "a ban asked for by "+what, propose(actor, ban()), codes.PermissionDenied)
	}
	for kind, may := range map[statev1.ActorKind]bool{
		statev1.ActorKind_ACTOR_KIND_MEMBER: false, statev1.ActorKind_ACTOR_KIND_APPLICANT: false, 99: false,
		statev1.ActorKind_ACTOR_KIND_OPERATOR: true, statev1.ActorKind_ACTOR_KIND_ADMINISTRATOR: true, // controls
	} {
		command := &statev1.Command{ActorKind: kind, Body: &statev1.Command_EvictAgent{EvictAgent: &statev1.EvictAgent{Name: "nobody"}}}
		if err := propose("somebody", command); (status.Code(err) == codes.PermissionDenied) == may {
			t.Errorf("asked for by somebody of kind %v: %v", kind, err)
		}
	}
	var theirs string
	for _, a := range leader.Status().GetAuthorities() {
		if a.GetMemberId() == leader.Node().ID() && a.GetUse() == statev1.KeyUse_KEY_USE_X509 && a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE {
			theirs = a.GetId()
		}
	}
	wantCode(t, "another node's authority, activated by itself", propose("CA node x", &statev1.Command{
		Body: &statev1.Command_ActivateAuthority{ActivateAuthority: &statev1.ActivateAuthority{Id: theirs}},
	}), codes.PermissionDenied)
	if err := propose("local user eve", &statev1.Command{Body: &statev1.Command_BanAgent{BanAgent: &statev1.BanAgent{Name: "h2"}}}); err != nil {
		t.Errorf("control: an operator's ban: %v", err)
	}
	audit, err := os.ReadFile(filepath.Join(leader.Config().DataDir, "audit.log"))
	if want := `"who":"local user eve","via":"CA node ` + stolen.Config().Name + ` (` + id + `)","what":"BanAgent","on":["agent/h2"],"result":"done"`; err != nil || !strings.Contains(string(audit), want) {
		t.Errorf("the leader's audit log does not say %s: %v", want, err)
	}
	v.serves("afterwards")
}

// A member that was removed: nothing it says is heard any more, what it said is forgotten,
// nothing it vouches for counts, and its open connections end.
func TestRemovedMemberIsNotHeard(t *testing.T) {
	t.Parallel()
	v := newVictim(t)
	v.Join("ca-2", "dc2")
	gone := v.Join("ca-3", "dc3")
	cert := memberCertificate(t, gone)
	door := ententev1.NewPeerClient(dial(t, v.CA, &cert))
	calls := map[string]func() error{
		"vouch": func() error {
			_, err := door.Vouch(t.Context(), &ententev1.VouchRequest{MemberId: v.Node().ID()})
			return err
		},
		"report": func() error {
			_, err := door.Report(t.Context(), &ententev1.ReportRequest{BootId: "x", AcknowledgedRevision: 1 << 40})
			return err
		},
		"propose": func() error {
			data, _ := proto.Marshal(&statev1.Command{Actor: "local user", Body: &statev1.Command_BanAgent{BanAgent: &statev1.BanAgent{Name: "nobody"}}})
			_, err := door.Propose(t.Context(), &ententev1.ProposeRequest{Command: data})
			return err
		},
		"checksum": func() error {
			_, err := door.Checksum(t.Context(), &ententev1.ChecksumRequest{AtIndex: 1, Format: domain.ChecksumFormat})
			return err
		},
		"mark": func() error {
			_, err := door.MarkReady(t.Context(), &ententev1.MarkReadyRequest{Id: "x"})
			return err
		},
	}
	shutOut := func(err error) bool {
		return status.Code(err) == codes.PermissionDenied || status.Code(err) == codes.Unauthenticated
	}
	for what, call := range calls {
		if err := call(); shutOut(err) {
			t.Errorf("control: a member may not %s: %v", what, err)
		}
	}
	stream, err := door.Presence(t.Context(), &ententev1.PresenceRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatalf("control: %v", err)
	}
	// It holds an agent's stream, and its word on what that one serves is shown.
	host := attest(t, v.CA, "h2")
	within(t, "it knows the agent", func() (known bool) {
		gone.Node().Read(func(st *domain.State) { _, known = st.Agent("h2") })
		return known
	})
	agent := openSync(t, dial(t, gone, &host), "boot", 1, 0)
	agent.report(t, &ententev1.Instance{Service: "ledger", Address: "127.0.0.1:7443", Health: ententev1.Health_HEALTH_HEALTHY})
	of := func(name string) (shown []string) {
		for _, i := range v.Status().GetInstances() {
			if i.GetAgent() == name {
				shown = append(shown, i.GetAddress())
			}
		}
		return shown
	}
	within(t, "control: what it says is shown", func() bool { return len(of("h2")) == 1 })
	other := openSync(t, dial(t, v.CA, &v.good), "boot", 1, 0)
	other.report(t, &ententev1.Instance{Service: "accounts", Address: "127.0.0.1:7443", Health: ententev1.Health_HEALTH_HEALTHY})
	within(t, "control: an instance of this node's", func() bool { return len(of("h1")) == 1 })

	if _, err := v.RemoveNode(t.Context(), "ca-3", false); err != nil {
		t.Fatal(err)
	}
	removed := time.Now()
	within(t, "it is removed", func() bool {
		_, member := memberOf(v, gone.Node().ID())
		return !member
	})
	within(t, "what it said is forgotten", func() bool { return len(of("h2")) == 0 })
	if took := time.Since(removed); took > 2*time.Second {
		t.Errorf("forgotten after %v", took)
	}
	if len(of("h1")) != 1 {
		t.Error("control: what this node's own agent serves is forgotten with it")
	}
	ended := make(chan struct{})
	go func() { // until the test ends its context
		defer close(ended)
		for err := error(nil); err == nil; {
			_, err = stream.Recv()
		}
	}()
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		t.Error("its open connection does not end")
	}
	for what, call := range calls {
		if err := call(); !shutOut(err) {
			t.Errorf("a removed member may %s: %v", what, err)
		}
	}
	gone.Kill()
	v.serves("afterwards")
}

func memberOf(v *victim, id string) (m *statev1.Member, ok bool) {
	v.Node().Read(func(st *domain.State) { m, ok = st.Member(id) })
	return m, ok
}
