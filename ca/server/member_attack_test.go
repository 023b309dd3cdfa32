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

// A member that was removed: nothing it says is heard any more, nothing it vouches for
// counts, and its open connections end.
func TestRemovedMemberIsNotHeard(t *testing.T) {
	t.Parallel()
	v := newVictim(t)
	two, three := v.Join("ca-2", "dc2"), v.Join("ca-3", "dc3")
	_ = two
	gone := three
	cert := memberCertificate(t, gone)
	conn := dial(t, v.CA, &cert)
	door := ententev1.NewPeerClient(conn)
	vouch := func() error {
		_, err := door.Vouch(t.Context(), &ententev1.VouchRequest{MemberId: v.Node().ID()})
		return err
	}
	if err := vouch(); err != nil {
		t.Fatalf("control: %v", err)
	}
	presence, err := door.Presence(t.Context(), &ententev1.PresenceRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := presence.Recv(); err != nil {
		t.Fatalf("control: %v", err)
	}
	if _, err := v.RemoveNode(t.Context(), "ca-3", false); err != nil {
		t.Fatal(err)
	}
	member := true
	for deadline := time.Now().Add(10 * time.Second); member && time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		v.Node().Read(func(st *domain.State) { _, member = st.Member(gone.Node().ID()) })
	}
	for err = nil; err == nil; {
		_, err = presence.Recv() // its open connection ends
	}
	if err := vouch(); err == nil {
		t.Error("it vouches")
	}
	for what, call := range map[string]func() error{
		"report": func() error {
			_, err := door.Report(t.Context(), &ententev1.ReportRequest{BootId: "x", AcknowledgedRevision: 1 << 40})
			return err
		},
		"propose": func() error {
			data, _ := proto.Marshal(&statev1.Command{Actor: "local user", Body: &statev1.Command_ApplyObjects{ApplyObjects: &statev1.ApplyObjects{}}})
			_, err := door.Propose(t.Context(), &ententev1.ProposeRequest{Command: data})
			return err
		},
		"checksum": func() error {
			_, err := door.Checksum(t.Context(), &ententev1.ChecksumRequest{AtIndex: 1, Format: domain.ChecksumFormat})
			return err
		},
	} {
		if err := call(); err == nil {
			t.Errorf("a removed member may %s", what)
		}
	}
	gone.Kill()
	v.serves("afterwards")
}
