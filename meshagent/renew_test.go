package meshagent

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/peer/peertest"
	"github.com/entente-mesh/entente/meshagent/services"
)

var (
	bank  = spiffeid.RequireTrustDomainFromString("banking.example")
	trade = spiffeid.RequireTrustDomainFromString("trading.example")
)

// fakeCA signs as a CA would; the fields say how it fails or lies.
type fakeCA struct {
	authority *peertest.Authority
	life      time.Duration

	mu     sync.Mutex
	paths  map[string]string // of entries
	fails  error
	holds  map[string]client.Record                            // of entries: requests for another record are refused; none: whatever is asked for
	lie    func(entryID string, key crypto.PublicKey) [][]byte // nil: the truth
	calls  []time.Time
	signed map[string]int
	keys   map[string]bool // that were signed, to see that none comes twice

	tokens fakeTokens
}

func (f *fakeCA) SignX509(_ context.Context, requests []client.SignRequest) []client.SignResult {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, time.Now())
	results := make([]client.SignResult, len(requests))
	for i, r := range requests {
		csr, err := x509.ParseCertificateRequest(r.CSR)
		if err == nil {
			err = csr.CheckSignature()
		}
		if err != nil {
			panic(err)
		}
		path, known := f.paths[r.EntryID]
		switch {
		case f.fails != nil:
			results[i].Err = f.fails
		case !known:
			results[i].Err = fmt.Errorf("%w: no such entry", client.ErrDenied)
		case f.holds[r.EntryID] != (client.Record{}) && f.holds[r.EntryID] != r.Record:
			results[i].Err = client.ErrChanged
		case f.lie != nil:
			results[i].Certificates = f.lie(r.EntryID, csr.PublicKey)
		default:
			f.signed[r.EntryID]++
			f.keys[string(csr.RawSubjectPublicKeyInfo)] = true
			results[i].Certificates = issue(f.authority, csr.PublicKey, bank, path, f.life, from(f.tokens.origin))
		}
	}
	return results
}

func (f *fakeCA) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fakeCA) count(entryID string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.signed[entryID]
}

// publicOnly lets peertest issue for a key that only the other side holds.
type publicOnly struct {
	crypto.Signer
	public crypto.PublicKey
}

func (p publicOnly) Public() crypto.PublicKey { return p.public }

func issue(a *peertest.Authority, public crypto.PublicKey, td spiffeid.TrustDomain, path string, life time.Duration, opts ...peertest.Option) (chain [][]byte) {
	svid := a.IssueFor(publicOnly{public: public}, td, path, append(opts, peertest.TTL(life))...)
	for _, c := range svid.Certificates {
		chain = append(chain, c.Raw)
	}
	return chain
}

// from writes an origin into a certificate, if there is one.
func from(origin ca.Origin) peertest.Option {
	return func(template *x509.Certificate) {
		if origin == (ca.Origin{}) {
			return
		}
		extension, err := origin.Extension()
		if err != nil {
			panic(err)
		}
		template.ExtraExtensions = append(template.ExtraExtensions, extension)
	}
}

func entry(id, path string, revision uint64) *statev1.Entry {
	return &statev1.Entry{Id: id, Path: path, Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1000"}, Revision: revision}
}

// newAgent is an agent without a CA, a disk and a network.
func newAgent(t *testing.T, ca *fakeCA) *Agent {
	t.Helper()
	cfg := &Config{Name: "h1", domain: bank, DataDir: t.TempDir()}
	log := slog.New(slog.DiscardHandler)
	registry := services.Open(nil, "", cfg.DataDir, log, func() {})
	store := newStore(&State{View: &client.View{}}, newPlaces(cfg, registry), 0)
	counters := newMetrics(daemon.NewMetrics("agent"), store, nil, registry)
	known := &memory{dir: cfg.DataDir, log: log, known: &known{cluster: &statev1.Cluster{}}}
	self := &credentials{cfg: cfg, id: spiffeid.RequireFromPath(bank, "/entente/agent/h1"), key: peertest.NewKey(), memory: known}
	a := &Agent{store: store, cfg: cfg, jwts: newJWTs(log, store, ca, counters)}
	a.own = &ownIdentity{credentials: self, log: log, now: time.Now, store: store, signer: ca, failures: counters.failures}
	a.entries = &renewer{log: log, now: time.Now, store: store, signer: ca, metrics: counters}
	return a
}

func newFakeCA(life time.Duration) *fakeCA {
	return &fakeCA{authority: peertest.NewAuthority(bank), life: life, paths: map[string]string{}, signed: map[string]int{}, keys: map[string]bool{}}
}

// hold gives the agent entries, as if they had come over Sync.
func hold(a *Agent, ca *fakeCA, entries ...*statev1.Entry) {
	a.change(func(s *State) *State {
		next := *s
		next.Ready, next.Bundle, next.reissued = true, ca.authority.Bundle(), nil
		next.Identities = nil
		for _, e := range entries {
			before, _ := s.Identity(e.GetId())
			identity, err := next.identify(e, before, bank, "h1")
			if err != nil {
				panic(err)
			}
			next.Identities = append(next.Identities, identity)
		}
		return &next
	})
}

// background runs f until the test's bubble ends.
func background(t *testing.T, f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- f(ctx) }()
	return func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("returned %v", err)
		}
	}
}

func serial(a *Agent, entryID string) string {
	identity, ok := a.State().Identity(entryID)
	if !ok || identity.SVID == nil {
		return ""
	}
	svid, err := identity.SVID.Parsed()
	if err != nil {
		panic(err)
	}
	return svid.Certificates[0].SerialNumber.String()
}

// Every SVID is renewed at half of its life, give or take a tenth, each time with a new key;
// a new entry has its SVID at once.
func TestEntriesAreRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(time.Hour)
		ca.paths["service/a"], ca.paths["service/b"] = "/a", "/b"
		a := newAgent(t, ca)
		hold(a, ca, entry("service/a", "/a", 1))
		defer background(t, a.entries.keepX509)()
		synctest.Wait()
		if serial(a, "service/a") == "" {
			t.Fatal("a new entry has no SVID at once")
		}
		begin := time.Now()
		first := serial(a, "service/a")
		for serial(a, "service/a") == first && time.Since(begin) < time.Hour {
			time.Sleep(time.Second)
			synctest.Wait()
		}
		if took := time.Since(begin); took < 26*time.Minute || took > 34*time.Minute {
			t.Errorf("renewed after %v of an hour", took)
		}

		hold(a, ca, entry("service/a", "/a", 1), entry("service/b", "/b", 2))
		synctest.Wait()
		if serial(a, "service/b") == "" {
			t.Error("an entry that came later has no SVID at once")
		}
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		for _, id := range []string{"service/a", "service/b"} {
			if n := ca.count(id); n < 40 || n > 55 {
				t.Errorf("%s was signed %d times in a day of hours", id, n)
			}
		}
		if total := ca.count("service/a") + ca.count("service/b"); len(ca.keys) != total {
			t.Errorf("%d keys for %d SVIDs", len(ca.keys), total)
		}

		// An entry that is gone is not renewed any more.
		hold(a, ca, entry("service/b", "/b", 2))
		synctest.Wait()
		before := ca.count("service/a")
		time.Sleep(5 * time.Hour)
		if ca.count("service/a") != before {
			t.Error("an entry that is gone was renewed")
		}
		// Another revision is another generation: it is signed at once.
		before, former := ca.count("service/b"), serial(a, "service/b")
		hold(a, ca, entry("service/b", "/b", 3))
		synctest.Wait()
		if ca.count("service/b") != before+1 || serial(a, "service/b") == former {
			t.Error("an entry that has changed was not signed anew")
		}
		// Another path is another identity: the SVID of the former one is not handed out.
		ca.set(func() { ca.fails = client.ErrUnreachable })
		hold(a, ca, entry("service/b", "/c", 4))
		if serial(a, "service/b") != "" {
			t.Error("an entry has the SVID of its former path")
		}
	})
}

// Without a CA what is held stays, attempts become rare, and the renewal comes
// soon after the CA is back: the herd does not.
func TestRenewalWithoutCA(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(time.Hour)
		ca.paths["service/a"] = "/a"
		a := newAgent(t, ca)
		var log bytes.Buffer
		a.entries.log = slog.New(slog.NewTextHandler(&log, nil))
		hold(a, ca, entry("service/a", "/a", 1))
		stop := background(t, a.entries.keepX509)
		synctest.Wait()
		first := serial(a, "service/a")
		ca.set(func() { ca.fails, ca.calls = client.ErrUnreachable, nil })
		time.Sleep(55 * time.Minute)
		synctest.Wait()
		if serial(a, "service/a") != first {
			t.Fatal("what was held is gone")
		}
		if n := len(ca.calls); n < 30 || n > 200 {
			t.Errorf("%d attempts in half an hour", n)
		}
		ca.set(func() { ca.fails = nil })
		begin := time.Now()
		for serial(a, "service/a") == first && time.Since(begin) < time.Hour {
			time.Sleep(time.Second)
			synctest.Wait()
		}
		if took := time.Since(begin); took > retryMost+time.Second {
			t.Errorf("renewed %v after the CA was back", took)
		}
		stop()
		if n := strings.Count(log.String(), "not renewed"); n != 1 {
			t.Errorf("said %d times:\n%s", n, log.String())
		}
	})
}

// What a CA signs is not taken unless it is exactly what was asked for.
func TestLiesAreRefused(t *testing.T) {
	rogue := func() *peertest.Authority { return peertest.NewAuthority(bank) }
	tests := []struct {
		name string
		lie  func(ca *fakeCA, key crypto.PublicKey) [][]byte
	}{
		{"signed by another authority", func(_ *fakeCA, key crypto.PublicKey) [][]byte { return issue(rogue(), key, bank, "/a", time.Hour) }},
		{"for another trust domain", func(ca *fakeCA, key crypto.PublicKey) [][]byte {
			return issue(ca.authority, key, trade, "/a", time.Hour)
		}},
		{"for another identity", func(ca *fakeCA, key crypto.PublicKey) [][]byte {
			return issue(ca.authority, key, bank, "/b", time.Hour)
		}},
		{"for another key", func(ca *fakeCA, _ crypto.PublicKey) [][]byte {
			return issue(ca.authority, peertest.NewKey().Public(), bank, "/a", time.Hour)
		}},
		{"ended", func(ca *fakeCA, key crypto.PublicKey) [][]byte {
			return issue(ca.authority, key, bank, "/a", -time.Second)
		}},
		{"the authority itself", func(ca *fakeCA, _ crypto.PublicKey) [][]byte { return [][]byte{ca.authority.Cert.Raw} }},
		{"no certificate", func(*fakeCA, crypto.PublicKey) [][]byte { return [][]byte{[]byte("not DER")} }},
		{"nothing", func(*fakeCA, crypto.PublicKey) [][]byte { return nil }},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca := newFakeCA(time.Hour)
				ca.paths["service/a"] = "/a"
				a := newAgent(t, ca)
				hold(a, ca, entry("service/a", "/a", 1))
				defer background(t, a.entries.keepX509)()
				synctest.Wait()
				good := serial(a, "service/a")
				if good == "" {
					t.Fatal("control: the truth was refused")
				}
				ca.mu.Lock()
				ca.lie = func(_ string, key crypto.PublicKey) [][]byte { return test.lie(ca, key) }
				ca.mu.Unlock()
				hold(a, ca, entry("service/a", "/a", 2)) // to be signed at once
				time.Sleep(time.Minute)
				if got := serial(a, "service/a"); got != good {
					t.Errorf("the lie was taken: %q", got)
				}
				ca.set(func() { ca.lie = nil })
				time.Sleep(time.Minute)
				if got := serial(a, "service/a"); got == good {
					t.Error("control: the truth was not taken afterwards")
				}
			})
		})
	}
}

// When the bundle loses the authority of an SVID, that is signed anew at once.
func TestVoidSVIDIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(time.Hour)
		ca.paths["service/a"] = "/a"
		a := newAgent(t, ca)
		e := entry("service/a", "/a", 1)
		hold(a, ca, e)
		defer background(t, a.entries.keepX509)()
		synctest.Wait()
		former := serial(a, "service/a")
		ca.set(func() { ca.authority = peertest.NewAuthority(bank) })
		hold(a, ca, e)
		synctest.Wait()
		if serial(a, "service/a") == former {
			t.Error("an SVID under an authority that is not in the bundle is kept")
		}
	})
}

// The agent's own SVID is renewed for the same key.
func TestOwnSVIDIsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(time.Hour)
		ca.paths[""] = "/entente/agent/h1"
		a := newAgent(t, ca)
		a.change(func(s *State) *State {
			next := *s
			next.Bundle = ca.authority.Bundle()
			next.own = ca.authority.IssueFor(a.own.key, bank, "/entente/agent/h1", peertest.TTL(time.Hour))
			return &next
		})
		first := a.State().own
		identified := make(chan struct{})
		defer background(t, func(ctx context.Context) error { return a.own.run(ctx, identified) })()
		<-identified
		time.Sleep(26 * time.Minute)
		if a.State().own != first {
			t.Error("renewed too early")
		}
		time.Sleep(9 * time.Minute)
		synctest.Wait()
		own := a.State().own
		if own == first || own.PrivateKey != a.own.key {
			t.Error("not renewed for the same key")
		}

		// A lie is not taken, and does not stop the renewal.
		ca.mu.Lock()
		ca.lie = func(_ string, key crypto.PublicKey) [][]byte {
			return issue(ca.authority, key, bank, "/entente/agent/h2", time.Hour)
		}
		ca.mu.Unlock()
		time.Sleep(45 * time.Minute)
		if a.State().own != own {
			t.Error("another agent's SVID was taken")
		}
		ca.set(func() { ca.lie = nil })
		time.Sleep(time.Minute)
		synctest.Wait()
		if a.State().own == own {
			t.Error("not renewed after the lie")
		}
	})
}

// The host's clock is set, forward (or the host has slept) and back: what has ended by
// the new time is renewed within moments, what was due is not forgotten, and what is good
// by it stays in use.
func TestClockIsSet(t *testing.T) {
	for name, by := range map[string]time.Duration{"forward": 100 * time.Minute, "a little forward": 40 * time.Minute, "back": -100 * time.Minute} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca := newFakeCA(time.Hour)
				ca.paths["service/a"] = "/a"
				a := newAgent(t, ca)
				var offset atomic.Int64
				a.own.now = func() time.Time { return time.Now().Round(0).Add(time.Duration(offset.Load())) }
				a.entries.now = a.own.now
				hold(a, ca, entry("service/a", "/a", 1))
				own := issue(ca.authority, a.own.key.Public(), bank, "/entente/agent/h1", time.Hour)
				svid, err := verifySVID(a.own.id, own, a.own.key, a.State().Bundle, time.Now())
				if err != nil {
					t.Fatal(err)
				}
				a.change(func(s *State) *State { next := *s; next.own = svid; return &next })
				ca.paths[""] = "/entente/agent/h1"
				defer background(t, a.entries.keepX509)()
				defer background(t, func(ctx context.Context) error { return a.own.run(ctx, make(chan struct{})) })()
				time.Sleep(time.Minute)
				synctest.Wait()
				if ca.count("service/a") != 1 || ca.count("") != 0 {
					t.Fatalf("control: signed %d, %d", ca.count("service/a"), ca.count(""))
				}
				before := serial(a, "service/a")

				offset.Store(int64(by))
				ca.set(func() { ca.life += by }) // its clock is right, and ours is not
				time.Sleep(lookAtClock + time.Second)
				synctest.Wait()
				switch {
				case by > time.Hour:
					if ca.count("service/a") == 1 || serial(a, "service/a") == before {
						t.Errorf("signed %d after the end", ca.count("service/a"))
					}
				case by > 0: // more than half is over: it is due again when half of the rest is
					if ca.count("service/a") != 1 || serial(a, "service/a") != before {
						t.Errorf("signed %d, with minutes left", ca.count("service/a"))
					}
					time.Sleep(13 * time.Minute)
					synctest.Wait()
					if ca.count("service/a") == 1 || ca.count("") == 0 {
						t.Errorf("signed %d, %d: by the new clock nothing is left to wait for", ca.count("service/a"), ca.count(""))
					}
				default:
					if serial(a, "service/a") != before {
						t.Error("what is good was replaced")
					}
					offset.Store(0) // and set right again
					ca.set(func() { ca.life -= by })
					time.Sleep(35 * time.Minute)
					synctest.Wait()
					if ca.count("service/a") == 1 || ca.count("") == 0 {
						t.Errorf("signed %d, %d: it is never renewed", ca.count("service/a"), ca.count(""))
					}
				}
			})
		})
	}
}

func TestPauses(t *testing.T) {
	if got := retryAfter(1, time.Hour); got > retryFirst {
		t.Errorf("the first pause is %v", got)
	}
	for n := 1; n < 100; n++ {
		if got := retryAfter(n, 10*time.Hour); got <= 0 || got > retryMost {
			t.Fatalf("pause %d with hours left is %v", n, got)
		}
		if got := retryAfter(n, 0); got <= 0 || got > retryEnded {
			t.Fatalf("pause %d is %v", n, got)
		}
		if got := retryAfter(n, 8*time.Second); got > 800*time.Millisecond {
			t.Fatalf("pause %d before the end in 8 s is %v", n, got)
		}
	}
}

// What the CA sends is taken as far as it is for this host.
// Requirements: 104, 126.
func TestView(t *testing.T) {
	authority, foreign := peertest.NewAuthority(bank), peertest.NewAuthority(trade)
	view := func(revision uint64, entries ...*statev1.Entry) *client.View {
		return &client.View{Revision: revision, Changed: revision, Entries: entries,
			Bundles: map[string][]byte{"banking.example": jwks(t, authority), "trading.example": jwks(t, foreign)}}
	}
	federates := entry("gateway/gw", "/entente/gateway/gw", 1)
	federates.Role, federates.FederatesWith = statev1.Role_ROLE_GATEWAY, []string{"trading.example", "unknown.example"}
	elsewhere := entry("service/x", "/x", 1)
	elsewhere.Hosts = []string{"h2"}

	start := &State{View: &client.View{}}
	s, complaints, err := start.withView(view(1, federates, entry("service/a", "/a", 1)), bank, "h1")
	if err != nil || len(complaints) > 0 || len(s.Identities) != 2 || !s.Ready {
		t.Fatalf("%v %v %v", s, complaints, err)
	}
	gateway, _ := s.Identity("gateway/gw")
	if len(gateway.Federated) != 1 || gateway.Federated[0].TrustDomain() != trade {
		t.Errorf("the gateway federates with %v", gateway.Federated)
	}
	// I6: a foreign root is for entries that federate by name only.
	if service, _ := s.Identity("service/a"); len(service.Federated) != 0 {
		t.Errorf("a service got foreign roots: %v", service.Federated)
	}

	for name, wrong := range map[string]*statev1.Entry{
		"for another host":     elsewhere,
		"a reserved path":      entry("service/evil", "/entente/ca/ca-1", 1),
		"a path that is none":  entry("service/evil", "/a/../b", 1),
		"no path":              entry("service/evil", "", 1),
		"a relative path":      entry("service/evil", "a", 1),
		"another trust domain": entry("service/evil", "spiffe://trading.example/a", 1),
	} {
		got, complaints, err := s.withView(view(2, entry("service/a", "/a", 1), wrong), bank, "h1")
		if err != nil || len(complaints) != 1 || len(got.Identities) != 1 || got.Identities[0].ID.Path() != "/a" {
			t.Errorf("%s: identities %v, complaints %v, %v", name, got.Identities, complaints, err)
		}
	}

	bad := view(3, entry("service/a", "/a", 1))
	bad.Bundles["trading.example"] = []byte("{")
	got, complaints, err := s.withView(bad, bank, "h1")
	if err != nil || len(complaints) != 1 || got.Foreign[trade] != s.Foreign[trade] {
		t.Errorf("an unreadable foreign bundle: %v %v %v", got, complaints, err)
	}
	bad.Bundles["banking.example"] = []byte("{")
	// An unreadable own bundle keeps nothing else out, least of all what restricts; and it is
	// not forgotten while other things change.
	bad.Distrust = ca.NewDistrusted(bank, []*statev1.Distrust{{Id: "agent/h9", Agent: "h9", AgentGeneration: 1}})
	bad.Entries = nil
	got, _, err = s.withView(bad, bank, "h1")
	if err == nil || got == nil || got.Bundle != s.Bundle || got.View.Distrust == nil || len(got.Identities) != 0 {
		t.Fatalf("an unreadable own bundle: %v %v", got, err)
	}
	later := *bad
	later.Instances = []client.Instance{{Service: "a"}}
	if again, _, err := got.withView(&later, bank, "h1"); err == nil || again == nil {
		t.Error("an unreadable own bundle is forgotten")
	}
	if mended, _, err := got.withView(view(4, entry("service/a", "/a", 1)), bank, "h1"); err != nil || mended.unread != nil || len(mended.Identities) != 1 {
		t.Errorf("control: a readable one: %v", err)
	}
	if got, _, err := start.withView(bad, bank, "h1"); err == nil || got != nil {
		t.Errorf("ready without a bundle: %v", got)
	}

	// Other instances are not another identity.
	same := *s.View
	same.Revision++
	if got, _, err := s.withView(&same, bank, "h1"); err != nil || got != nil {
		t.Errorf("only another revision: %v %v", got, err)
	}
	same.Instances = []client.Instance{{Service: "a"}}
	s.reissued = make(chan struct{})
	if got, _, err := s.withView(&same, bank, "h1"); err != nil || got.reissued == nil || len(got.View.Instances) != 1 {
		t.Errorf("instances: %v %v", got, err)
	}
}
