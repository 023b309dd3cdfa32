package domain

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain/domaintest"
)

// federated is a state of the newest level that knows two other domains.
func federated(t testing.TB) *world {
	w := newWorld(t)
	w.must(level("n1", FeatureLevel))
	for _, td := range []string{"evil.example", "trading.example"} {
		r := relationship(td)
		r.GetRelationship().Wit = true
		w.must(objects(r))
	}
	return w
}

func keyNamed(name string) string { return domaintest.KeyID("authority " + name) }

// holds are the ids of the keys that are used of a domain's bundle.
func (w *world) holds(td string) (ids []string) {
	w.t.Helper()
	b, ok := w.s.ForeignBundle(td)
	if !ok {
		w.t.Fatalf("no bundle of %s", td)
	}
	keys, sequence, err := ca.BundleKeys(b.GetJwks())
	if err != nil || sequence != b.GetSequence() {
		w.t.Fatalf("what is used of the bundle of %s: %v, sequence %d", td, err, sequence)
	}
	for _, k := range keys {
		ids = append(ids, k.ID)
	}
	return ids
}

const (
	x509Use = statev1.KeyUse_KEY_USE_X509
	jwtUse  = statev1.KeyUse_KEY_USE_JWT
	witUse  = statev1.KeyUse_KEY_USE_WIT
)

// A domain that lists another's key in its own bundle takes nothing from it, whoever came
// first (I2). The control is the thief's own key, which stays.
func TestKeyBelongsToWhoProvesIt(t *testing.T) {
	const victim, evil = "trading.example", "evil.example"
	for _, use := range []statev1.KeyUse{x509Use, jwtUse, witUse} {
		mine := domaintest.BundleKey{Name: "victim", Use: use, Names: victim}
		own := domaintest.BundleKey{Name: "evil", Use: use, Names: evil}
		for what, stolen := range map[string]domaintest.BundleKey{
			"as it is":                       mine,
			"under the thief's name":         {Name: "victim", Use: use, Names: evil, By: "evil"},
			"for another use":                {Name: "victim", Use: 1 + use%3, Names: evil, By: "evil"},
			"under the victim's name, bent":  {Name: "victim", Use: use, Names: victim, By: "evil"},
			"without a proof":                {Name: "victim", Use: jwtUse},
			"under the name of a third one":  {Name: "victim", Use: use, Names: "third.example", By: "evil"},
			"with a certificate of no proof": {Name: "victim", Use: x509Use, Names: evil, By: "evil"},
		} {
			for _, thiefFirst := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s %s, thief first %v", ca.UseName(use), what, thiefFirst), func(t *testing.T) {
					w := federated(t)
					steps := []*statev1.Command{
						foreign(evil, string(domaintest.Bundle(3, stolen, own)), 3),
						foreign(victim, string(domaintest.Bundle(5, mine)), 5),
					}
					if !thiefFirst {
						slices.Reverse(steps)
					}
					for _, step := range steps {
						w.must(step)
					}
					if got := w.holds(victim); !slices.Equal(got, []string{keyNamed("victim")}) {
						t.Errorf("the victim has %v left, and lost %v", got, w.s.DroppedKeys(victim))
					}
					if got := w.holds(evil); !slices.Equal(got, []string{keyNamed("evil")}) {
						t.Errorf("the thief has %v", got)
					}
					dropped := w.s.DroppedKeys(evil)
					if len(dropped) != 1 || dropped[0].ID != keyNamed("victim") || dropped[0].Other != victim {
						t.Errorf("what is said of it: %+v", dropped)
					}
					// The document counts as fetched: the same is no news, another is a conflict.
					w.unchanged(steps[0])
					w.refused(foreign(evil, string(domaintest.Bundle(3, own)), 3), CodeConflict)
				})
			}
		}
	}
}

// Proof of another domain's key counts although that domain is not known here.
func TestKeyOfAnUnknownDomain(t *testing.T) {
	w := federated(t)
	w.must(foreign("evil.example", string(domaintest.Bundle(1, domaintest.BundleKey{Name: "k", Use: x509Use, Names: "third.example"},
		domaintest.BundleKey{Name: "bent", Use: x509Use, Names: "third.example", By: "evil"}, domaintest.BundleKey{Name: "evil", Use: x509Use, Names: "evil.example"})), 1))
	// An intermediate that names another domain says nothing: SPIFFE allows it.
	if got := w.holds("evil.example"); !slices.Equal(got, []string{keyNamed("bent"), keyNamed("evil")}) {
		t.Errorf("it has %v", got)
	}
}

// A key of two domains that belongs to neither by proof is accepted for neither, whatever
// the order; when one of the two is gone, the other has it again.
func TestUnprovenKeyOfTwoDomains(t *testing.T) {
	const a, b = "evil.example", "trading.example"
	for _, use := range []statev1.KeyUse{x509Use, jwtUse} {
		shared := domaintest.BundleKey{Name: "shared", Use: use}
		if use == x509Use {
			shared.Names, shared.By = a, "root"
		}
		for _, order := range [][]string{{a, b}, {b, a}} {
			w := federated(t)
			w.must(foreign(order[0], string(domaintest.Bundle(1, shared, domaintest.BundleKey{Name: order[0], Use: use})), 1))
			if got := w.holds(order[0]); len(got) != 2 {
				t.Errorf("control: alone it has %v", got)
			}
			out := w.must(foreign(order[1], string(domaintest.Bundle(1, shared, domaintest.BundleKey{Name: order[1], Use: use})), 1))
			for _, td := range order {
				if got := w.holds(td); !slices.Equal(got, []string{keyNamed(td)}) {
					t.Errorf("%v: %s has %v", use, td, got)
				}
				if dropped := w.s.DroppedKeys(td); len(dropped) != 1 || dropped[0].Other == td || dropped[0].Other == "" {
					t.Errorf("%s: dropped %+v", td, dropped)
				}
				if !slices.ContainsFunc(out.Changes, func(c Change) bool { return c.Kind == ChangeForeignBundle && c.Key == td }) {
					t.Errorf("who holds the bundle of %s is not told", td)
				}
			}
			// The state of a snapshot uses the same.
			var image bytes.Buffer
			if _, err := w.s.Snapshot().WriteTo(&image); err != nil {
				t.Fatal(err)
			}
			restored, err := Restore(&image)
			if err != nil {
				t.Fatal(err)
			}
			for _, td := range order {
				was, _ := w.s.ForeignBundle(td)
				if now, ok := restored.ForeignBundle(td); !ok || !bytes.Equal(now.GetJwks(), was.GetJwks()) || len(restored.DroppedKeys(td)) != 1 {
					t.Errorf("restored: %s has %s, was %s", td, now.GetJwks(), was.GetJwks())
				}
			}
			out = w.must(deletes("Relationship/" + order[0]))
			if got := w.holds(order[1]); len(got) != 2 || len(w.s.DroppedKeys(order[1])) != 0 {
				t.Errorf("%s is not healed: %v", order[1], got)
			}
			if !slices.ContainsFunc(out.Changes, func(c Change) bool { return c.Kind == ChangeForeignBundle && c.Key == order[1] }) {
				t.Errorf("nobody is told that %s is healed", order[1])
			}
		}
	}
}

// A key that has signed for two domains is no one's: its holder speaks for both.
func TestKeyProvenForTwoDomains(t *testing.T) {
	w := federated(t)
	for _, td := range []string{"evil.example", "trading.example"} {
		w.must(foreign(td, string(domaintest.Bundle(1, domaintest.BundleKey{Name: "k", Use: jwtUse, Names: td})), 1))
	}
	for _, td := range []string{"evil.example", "trading.example"} {
		if got := w.holds(td); len(got) != 0 {
			t.Errorf("%s has %v", td, got)
		}
	}
}

// No bundle of another domain has a key of this one, whether the key or the bundle was
// first; and listing it does not keep it from being prepared.
func TestOwnKeysAreNobodyElses(t *testing.T) {
	for _, bundleFirst := range []bool{true, false} {
		w := federated(t)
		x := w.authority("n1", "own x509")
		j := domaintest.Prove(domaintest.Authority("n1", "own jwt", "banking.example", jwtUse, w.s.Now(), w.s.Lifetimes().Phase), "own jwt", "banking.example")
		steps := []*statev1.Command{prepare(x), prepare(j), foreign("evil.example", string(domaintest.Bundle(1,
			domaintest.BundleKey{Name: "own x509", Use: x509Use, Names: "evil.example", By: "evil"},
			domaintest.BundleKey{Name: "own jwt", Use: jwtUse}, domaintest.BundleKey{Name: "evil", Use: jwtUse})), 1)}
		if bundleFirst {
			slices.Reverse(steps)
		}
		for _, step := range steps {
			w.must(step)
		}
		if got := w.holds("evil.example"); !slices.Equal(got, []string{keyNamed("evil")}) {
			t.Errorf("bundle first %v: it has %v", bundleFirst, got)
		}
		if len(w.s.DroppedKeys("evil.example")) != 2 || w.s.DroppedKeys("evil.example")[0].Other != "banking.example" {
			t.Errorf("dropped %+v", w.s.DroppedKeys("evil.example"))
		}
		if certificates, _ := w.s.OwnBundle(); len(certificates) != 1 || len(w.s.OwnKeys(jwtUse)) != 1 {
			t.Error("this domain lost a key")
		}
	}
}

// An authority shows that its key is held: a member cannot enter another's key.
func TestAuthorityShowsItsKey(t *testing.T) {
	w := federated(t)
	made := func(name string, use statev1.KeyUse) *statev1.Authority {
		return domaintest.Authority("n1", name, "banking.example", use, w.s.Now(), w.s.Lifetimes().Phase)
	}
	x := made("x", x509Use)
	x.Certificate = domaintest.Certificate(x, "banking.example", domaintest.Key("somebody"))
	root := made("root", x509Use)
	under := made("under", x509Use)
	under.Upstream, under.UpstreamNotAfter = root.GetCertificate(), root.GetNotAfter()
	beside := made("x", x509Use)
	beside.Proof = []byte{1}
	for name, bad := range map[string]*statev1.Authority{
		"no proof":                         made("j", jwtUse),
		"another domain's proof":           domaintest.Prove(made("j", jwtUse), "j", "trading.example"),
		"another key's proof":              domaintest.Prove(made("j", jwtUse), "somebody", "banking.example"),
		"a certificate that others signed": x,
		"an upstream that has not signed":  under,
		"a certificate and a proof":        beside,
	} {
		if r := w.refused(prepare(bad), CodeInvalid); r == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	w.must(prepare(domaintest.Prove(made("j", jwtUse), "j", "banking.example")))
	w.must(prepare(domaintest.Prove(made("w", witUse), "w", "banking.example")))
	under.Certificate = domaintest.Certificate(under, "banking.example", domaintest.Key("authority root"))
	w.must(prepare(under))

	// Below the level nothing is asked for.
	old := newWorld(t)
	old.must(prepare(made("j", jwtUse)))
}

// Below the level, and from it on for bundles that were kept before.
func TestForeignBundlesBelowTheLevel(t *testing.T) {
	w := newWorld(t)
	w.must(objects(relationship("evil.example"), relationship("trading.example")))
	shared := domaintest.Bundle(5, domaintest.BundleKey{Name: "victim", Use: x509Use, Names: "trading.example"})
	for _, td := range []string{"evil.example", "trading.example"} {
		w.must(foreign(td, string(shared), 5))
		if got := w.holds(td); len(got) != 1 {
			t.Errorf("%s has %v: an older CA node would use all that is kept", td, got)
		}
	}
	out := w.must(level("n1", FeatureLevel))
	if got := w.holds("evil.example"); len(got) != 0 {
		t.Errorf("at the new level it has %v", got)
	}
	if got := w.holds("trading.example"); len(got) != 1 {
		t.Errorf("at the new level the owner has %v", got)
	}
	if n := len(slices.DeleteFunc(out.Changes, func(c Change) bool { return c.Kind != ChangeForeignBundle })); n != 1 {
		t.Errorf("%d bundles are said to have changed", n)
	}
	// What was kept was a part: the whole of the same sequence replaces it, once.
	whole := string(domaintest.Bundle(5, domaintest.BundleKey{Name: "victim", Use: x509Use, Names: "trading.example"}, domaintest.BundleKey{Name: "evil", Use: jwtUse}))
	w.must(foreign("evil.example", whole, 5))
	w.unchanged(foreign("evil.example", whole, 5))
	w.refused(foreign("evil.example", string(shared), 5), CodeConflict)
	w.refused(foreign("evil.example", string(domaintest.Bundle(4)), 4), CodeSequence)

	for name, bad := range map[string]string{
		"another sequence": whole,
		"blanks":           strings.Replace(string(domaintest.Bundle(9)), ",", ", ", 1),
		"a key hidden":     strings.Replace(string(domaintest.Bundle(9)), "}", `,"keys":[]}`, 1),
	} {
		if r := w.refused(foreign("evil.example", bad, 9), CodeInvalid); r == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

// WIT keys are used of a peer's bundle only where the relationship says so.
func TestWITKeysAreAskedFor(t *testing.T) {
	w := newWorld(t)
	w.must(level("n1", FeatureLevel))
	w.must(objects(relationship("trading.example")))
	w.must(foreign("trading.example", string(domaintest.Bundle(1, domaintest.BundleKey{Name: "j", Use: jwtUse}, domaintest.BundleKey{Name: "w", Use: witUse})), 1))
	if got := w.holds("trading.example"); !slices.Equal(got, []string{keyNamed("j")}) || len(w.s.DroppedKeys("trading.example")) != 0 {
		t.Errorf("it has %v, dropped %v", got, w.s.DroppedKeys("trading.example"))
	}
	r := relationship("trading.example")
	r.GetRelationship().Wit = true
	w.must(objects(r))
	if got := w.holds("trading.example"); len(got) != 2 {
		t.Errorf("it has %v", got)
	}
}

// The largest bundles that two domains may have, equal and all claimed by both, are compared
// without holding the state for long.
func TestLargestBundlesAreComparedSoon(t *testing.T) {
	w := federated(t)
	document := func(td string) (b []byte) {
		var keys []domaintest.BundleKey
		for i := 0; len(b) < maxBundle-2000; i++ {
			keys = append(keys, domaintest.BundleKey{Name: fmt.Sprint("k", i), Use: x509Use, Names: td})
			b = domaintest.Bundle(1, keys...)
		}
		return b
	}
	w.must(foreign("evil.example", string(document("evil.example")), 1))
	other := foreign("trading.example", string(document("trading.example")), 1)
	w.index++
	began := time.Now()
	out := w.s.Apply(w.index, other)
	took := time.Since(began)
	if n := len(w.s.DroppedKeys("trading.example")); out.Refused != nil || n < 50 {
		t.Fatalf("control: %v, %d keys are claimed by both", out.Refused, n)
	}
	t.Logf("%d keys of both: %v", len(w.s.DroppedKeys("trading.example")), took)
	if took > 100*time.Millisecond {
		t.Errorf("it held the state for %v", took)
	}
}
