package signer

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

var banking = spiffeid.RequireTrustDomainFromString("banking.example")

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newAuthority(t *testing.T, key crypto.Signer, phase time.Duration) *statev1.Authority {
	t.Helper()
	var serial [16]byte
	rand.Read(serial[:])
	now := time.Now()
	template, err := ca.AuthorityTemplate(ca.AuthorityRequest{TrustDomain: banking, PublicKey: key.Public(), Serial: serial, Now: now, Phase: phase})
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	authority, err := ca.NewAuthority(banking, strings.Repeat("0", 64), der, nil, phase, now)
	if err != nil {
		t.Fatal(err)
	}
	authority.Phase = statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE
	return authority
}

// world is a signer whose agreed state the test sets.
type world struct {
	*Signer
	authority *statev1.Authority
	clock     Clock
}

func newWorld(t *testing.T, phase time.Duration, slots int) *world {
	t.Helper()
	key := newKey(t)
	w := &world{authority: newAuthority(t, key, phase)}
	w.Signer = New(Config{
		Active:      func(statev1.KeyUse) *statev1.Authority { return w.authority },
		Clock:       func() Clock { return w.clock },
		Concurrency: slots,
	})
	id, err := w.Add(key)
	if err != nil {
		t.Fatal(err)
	}
	if id != w.authority.GetId() || !w.Has(id) {
		t.Fatalf("authority %s was added as %s", w.authority.GetId(), id)
	}
	return w
}

func request(t *testing.T) Request {
	return Request{
		ID:        spiffeid.RequireFromPath(banking, "/accounts"),
		DNSNames:  []string{"accounts.banking.example"},
		PublicKey: newKey(t).Public(),
		Life:      time.Hour,
		Origin:    ca.Origin{Entry: "service/accounts", EntryGeneration: 7, Agent: "h1", AgentGeneration: 5},
	}
}

// Requirements: 22-24, 30, 32, 34-37.
func TestSignFollowsTheProfile(t *testing.T) {
	w := newWorld(t, 48*time.Hour, 0)
	serials := make(map[string]bool)
	for range 8 {
		chain, err := w.Sign(t.Context(), request(t))
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(chain[0])
		if err != nil {
			t.Fatal(err)
		}
		authority, err := x509.ParseCertificate(w.authority.GetCertificate())
		if err != nil {
			t.Fatal(err)
		}
		if err := ca.LintLeaf(leaf, authority); err != nil {
			t.Error(err)
		}
		if err := leaf.CheckSignatureFrom(authority); err != nil {
			t.Error(err)
		}
		if origin, ok, err := ca.OriginOf(leaf); !ok || err != nil || origin != request(t).Origin {
			t.Errorf("origin %+v %v %v", origin, ok, err)
		}
		serials[leaf.SerialNumber.String()] = true
	}
	if len(serials) != 8 {
		t.Errorf("%d different serial numbers among 8", len(serials))
	}
}

func TestLeafNeverOutlivesAuthority(t *testing.T) {
	w := newWorld(t, time.Hour, 0)
	req := request(t)
	req.Life = 30 * 24 * time.Hour
	chain, err := w.Sign(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	if end := leaf.NotAfter.Unix(); end != w.authority.GetNotAfter() {
		t.Errorf("the leaf ends at %d, its authority at %d", end, w.authority.GetNotAfter())
	}
}

func TestOnlyTheActiveAuthoritySigns(t *testing.T) {
	w := newWorld(t, time.Hour, 0)
	if err := w.Ready(statev1.KeyUse_KEY_USE_X509); err != nil {
		t.Fatalf("ready: %v", err)
	}
	for _, phase := range statev1.AuthorityPhase_value {
		w.authority.Phase = statev1.AuthorityPhase(phase)
		_, err := w.Sign(t.Context(), request(t))
		if active := w.authority.Phase == statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE; active != (err == nil) {
			t.Errorf("%s: %v", w.authority.Phase, err)
		} else if !active && !errors.Is(err, ErrNoAuthority) {
			t.Errorf("%s: %v is not ErrNoAuthority", w.authority.Phase, err)
		}
	}

	// An authority of somebody else, and none.
	foreign := newAuthority(t, newKey(t), time.Hour)
	w.authority = foreign
	if _, err := w.Sign(t.Context(), request(t)); !errors.Is(err, ErrNoAuthority) {
		t.Errorf("without the key: %v", err)
	}
	w.authority = nil
	if err := w.Ready(statev1.KeyUse_KEY_USE_X509); !errors.Is(err, ErrNoAuthority) {
		t.Errorf("ready without an authority: %v", err)
	}
}

// While the next authority is being agreed on, as after a taint, requests wait for it, for a
// bounded time. Without one that comes they are refused at once, for another CA node to
// be asked.
func TestSignWaitsForTheNextAuthority(t *testing.T) {
	const use = statev1.KeyUse_KEY_USE_X509
	ways := map[string]func(*testing.T, *Signer) error{
		"Sign": func(t *testing.T, s *Signer) error {
			_, err := s.Sign(t.Context(), request(t))
			return err
		},
		"Await": func(t *testing.T, s *Signer) error { return s.Await(t.Context(), use) },
	}
	for name, ask := range ways {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var active atomic.Pointer[statev1.Authority]
				var coming atomic.Pointer[chan struct{}]
				key := newKey(t)
				s := New(Config{
					Active: func(statev1.KeyUse) *statev1.Authority { return active.Load() },
					Coming: func(statev1.KeyUse) <-chan struct{} {
						if c := coming.Load(); c != nil {
							return *c
						}
						return nil
					},
					Clock: func() Clock { return Clock{} },
				})
				if _, err := s.Add(key); err != nil {
					t.Fatal(err)
				}
				begin := time.Now()
				if err := ask(t, s); !errors.Is(err, ErrNoAuthority) || time.Since(begin) != 0 {
					t.Errorf("none comes: %v after %v", err, time.Since(begin))
				}

				other, agreed := make(chan struct{}), make(chan struct{})
				coming.Store(&other)
				time.AfterFunc(maxWait/4, func() { // another change of the state
					coming.Store(&agreed)
					close(other)
				})
				time.AfterFunc(maxWait/2, func() {
					active.Store(newAuthority(t, key, time.Hour))
					close(agreed)
				})
				if err := ask(t, s); err != nil || time.Since(begin) != maxWait/2 {
					t.Errorf("one that comes: %v after %v", err, time.Since(begin))
				}

				never := make(chan struct{})
				coming.Store(&never)
				active.Store(nil)
				begin = time.Now()
				if err := ask(t, s); !errors.Is(err, ErrNoAuthority) || time.Since(begin) != maxWait {
					t.Errorf("one that does not come after all: %v after %v", err, time.Since(begin))
				}
			})
		})
	}
}

func TestRemovedKeyDoesNotSign(t *testing.T) {
	w := newWorld(t, time.Hour, 0)
	w.Remove(w.authority.GetId())
	if _, err := w.Sign(t.Context(), request(t)); !errors.Is(err, ErrNoAuthority) {
		t.Errorf("got %v", err)
	}
}

// Requirements: 20.
func TestForeignNameIsNotSigned(t *testing.T) {
	w := newWorld(t, time.Hour, 0)
	req := request(t)
	req.ID = spiffeid.RequireFromString("spiffe://trading.example/accounts")
	if _, err := w.Sign(t.Context(), req); err == nil {
		t.Error("an ID of another trust domain was signed")
	}
}

func TestClock(t *testing.T) {
	agreed := time.Date(2027, 3, 1, 12, 0, 0, 0, time.UTC)
	tests := []struct {
		name  string
		clock Clock
		now   time.Time
		ok    bool
	}{
		{"nothing agreed yet", Clock{}, agreed, true},
		{"exact", Clock{agreed, time.Second}, agreed.Add(time.Second), true},
		{"29 s ahead", Clock{agreed, time.Second}, agreed.Add(30 * time.Second), true},
		{"32 s ahead", Clock{agreed, time.Second}, agreed.Add(33 * time.Second), false},
		{"32 s behind", Clock{agreed, time.Second}, agreed.Add(-31 * time.Second), false},
		{"a day without quorum, drifted by 40 s", Clock{agreed, 24 * time.Hour}, agreed.Add(24*time.Hour + 40*time.Second), true},
		{"a day without quorum, set by 2 min", Clock{agreed, 24 * time.Hour}, agreed.Add(24*time.Hour + 2*time.Minute), false},
		{"lone restart, months later", Clock{agreed, NotSinceStart}, agreed.AddDate(0, 3, 0), true},
		{"lone restart in the past", Clock{agreed, NotSinceStart}, agreed.Add(-time.Second), false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			err := test.clock.Check(test.now)
			if (err == nil) != test.ok || err != nil && !errors.Is(err, ErrClock) {
				t.Errorf("got %v", err)
			}
		})
	}

	w := newWorld(t, time.Hour, 0)
	w.clock = Clock{Agreed: time.Now().Add(time.Minute), Age: time.Second}
	if _, err := w.Sign(t.Context(), request(t)); !errors.Is(err, ErrClock) {
		t.Errorf("signed with a wrong clock: %v", err)
	}
	w.clock = Clock{Agreed: time.Now(), Age: 0}
	if _, err := w.Sign(t.Context(), request(t)); err != nil {
		t.Errorf("not signed with a right clock: %v", err)
	}
}

func TestBusySignerSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, time.Hour, 1)
		w.slots <- struct{}{}
		begin := time.Now()
		if _, err := w.Sign(t.Context(), request(t)); !errors.Is(err, ErrBusy) {
			t.Errorf("got %v", err)
		}
		if waited := time.Since(begin); waited != maxWait {
			t.Errorf("waited %v", waited)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := w.Sign(ctx, request(t)); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		<-w.slots
		if _, err := w.Sign(t.Context(), request(t)); err != nil {
			t.Errorf("a free signer: %v", err)
		}
	})
}

func TestConcurrentUse(t *testing.T) {
	w := newWorld(t, time.Hour, 2)
	var group sync.WaitGroup
	for range 4 {
		req := request(t)
		group.Go(func() {
			for range 5 {
				if _, err := w.Sign(t.Context(), req); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Go(func() {
		for range 20 {
			if _, err := w.Add(newKey(t)); err != nil {
				t.Error(err)
			}
		}
	})
	group.Wait()
}

func BenchmarkSign(b *testing.B) {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	t := &testing.T{}
	authority := newAuthority(t, key, time.Hour)
	s := New(Config{Active: func(statev1.KeyUse) *statev1.Authority { return authority }, Clock: func() Clock { return Clock{} }})
	if _, err := s.Add(key); err != nil {
		b.Fatal(err)
	}
	req := Request{ID: spiffeid.RequireFromPath(banking, "/accounts"), PublicKey: key.Public(), Life: time.Hour}
	for b.Loop() {
		if _, err := s.Sign(b.Context(), req); err != nil {
			b.Fatal(err)
		}
	}
}
