package meshagent

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/internal/jwtsvid"
	"github.com/entente-mesh/entente/internal/secret"
)

// forUser is an entry for another user's processes, of the same revision.
func forUser(e *statev1.Entry, selector string) *statev1.Entry {
	other := proto.CloneOf(e)
	other.Selectors = []string{selector}
	return other
}

// A CA node that tells an agent of other selectors at the same revision gets no other
// process the SVID: what an honest node has signed stays with who satisfied its record,
// and it signs nothing under the other one. A true change gets a new SVID.
func TestSVIDIsShownUnderItsRecordOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		honest := newFakeCA(time.Hour)
		honest.paths["accounts"] = "/accounts"
		a := newAgent(t, honest)
		told := entry("accounts", "/accounts", 1)
		honest.holds = map[string]client.Record{"accounts": client.RecordOf(told)}
		hold(a, honest, told)
		defer background(t, a.entries.keepX509)()
		synctest.Wait()
		demands := func() []string {
			identity, _ := a.State().Identity("accounts")
			return identity.Demands
		}
		if _, err := a.SVIDs("accounts").GetX509SVID(); err != nil || !slices.Equal(demands(), []string{"unix:uid:1000"}) {
			t.Fatalf("control: %v, for %v", err, demands())
		}
		first := serial(a, "accounts")

		// The lie. Nobody satisfies both users.
		lie := forUser(told, "unix:uid:2000")
		hold(a, honest, lie)
		time.Sleep(time.Minute)
		if got := demands(); !slices.Equal(got, []string{"unix:uid:2000", "unix:uid:1000"}) {
			t.Errorf("the SVID of uid 1000 is shown to %v", got)
		}
		if serial(a, "accounts") != first || honest.count("accounts") != 1 {
			t.Error("a node that holds another record has signed")
		}
		asked := len(honest.calls)
		if asked < 3 || asked > 30 {
			t.Errorf("asked %d times within a minute", asked)
		}

		// The truth again: nothing has to be signed, and what was shown is shown.
		hold(a, honest, told)
		time.Sleep(time.Minute)
		if got := demands(); !slices.Equal(got, []string{"unix:uid:1000"}) {
			t.Errorf("after the lie it is shown to %v", got)
		}

		// A true change: at once to nobody whom both do not name, then signed, then to those
		// whom it names.
		changed := forUser(told, "unix:uid:2000")
		changed.Revision = 2
		before := serial(a, "accounts")
		honest.set(func() { honest.holds["accounts"] = client.RecordOf(changed) })
		hold(a, honest, changed)
		synctest.Wait()
		if got := demands(); !slices.Equal(got, []string{"unix:uid:2000"}) || serial(a, "accounts") == before {
			t.Errorf("control: a true change is shown to %v", got)
		}
	})
}

// What was asked for under one record is not taken into use under another one that came
// meanwhile.
func TestSVIDOfAFormerRecordIsDropped(t *testing.T) {
	honest := newFakeCA(time.Hour)
	honest.paths["accounts"] = "/accounts"
	a := newAgent(t, honest)
	told := entry("accounts", "/accounts", 1)
	hold(a, honest, told)
	asked, _ := a.State().Identity("accounts")
	one := &slot{entryID: "accounts", id: asked.ID, record: asked.record}
	hold(a, honest, forUser(told, "unix:uid:2000"))
	a.entries.renewX509(t.Context(), []*slot{one})
	if _, err := a.SVIDs("accounts").GetX509SVID(); err == nil {
		t.Error("it is in use")
	}
	hold(a, honest, told)
	a.entries.renewX509(t.Context(), []*slot{one})
	if _, err := a.SVIDs("accounts").GetX509SVID(); err != nil {
		t.Errorf("control: %v", err)
	}
}

// A selector more restricts at once; without selectors, or with one that this release does
// not know, no process is shown anything.
func TestDemandsRestrictAtOnce(t *testing.T) {
	honest := newFakeCA(time.Hour)
	honest.paths["accounts"] = "/accounts"
	a := newAgent(t, honest)
	told := entry("accounts", "/accounts", 1)
	hold(a, honest, told)
	asked, _ := a.State().Identity("accounts")
	a.entries.renewX509(t.Context(), []*slot{{entryID: "accounts", id: asked.ID, record: asked.record}})
	for _, c := range []struct{ told, demands, common []string }{
		{[]string{"unix:uid:1000"}, []string{"unix:uid:1000"}, []string{"unix:uid:1000"}},
		{[]string{"unix:uid:1000", "unix:gid:7"}, []string{"unix:uid:1000", "unix:gid:7"}, []string{"unix:uid:1000"}},
		{[]string{"unix:gid:7"}, []string{"unix:gid:7", "unix:uid:1000"}, nil},
		{nil, nil, nil},
		{[]string{"later:kind"}, []string{"later:kind", "unix:uid:1000"}, nil},
	} {
		other := proto.CloneOf(told)
		other.Selectors = c.told
		hold(a, honest, other)
		identity, _ := a.State().Identity("accounts")
		if identity.SVID == nil || !slices.Equal(identity.Demands, c.demands) || !slices.Equal(identity.Common(), c.common) {
			t.Errorf("told %v: %v, in common %v", c.told, identity.Demands, identity.Common())
		}
		if known := len(c.told) > 0 && c.told[0] != "later:kind"; (len(identity.selectors) > 0) != known {
			t.Errorf("told %v: a process is looked at for %v", c.told, identity.selectors)
		}
	}
}

// A JWT-SVID that was signed under one record is not handed out under another.
func TestJWTIsHandedOutUnderItsRecordOnly(t *testing.T) {
	told := entry("accounts", "/accounts", 1)
	s := &State{View: &client.View{}}
	identify := func(e *statev1.Entry) *Identity {
		identity, err := s.identify(e, nil, bank, "h1")
		if err != nil {
			t.Fatal(err)
		}
		return identity
	}
	j, now := newJWTs(nil, nil, nil, nil), time.Now()
	s.JWT = &TokenBundle{TrustDomain: bank, Keys: jwtsvid.Keys{"k": struct{}{}}}
	get := func(e *statev1.Entry) string {
		token, _, _, err := j.get(identify(e), []string{"vault"}, "vault", s, now)
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	get(told)
	h := j.held["accounts"]["vault"]
	h.token, h.signer, h.expires, h.half, h.pending = secret.Of("a token"), "k", now.Add(time.Hour), now.Add(time.Minute), nil
	if get(told) != "a token" {
		t.Error("control: it is not handed out under its own record")
	}
	if token := get(forUser(told, "unix:uid:2000")); token != "" {
		t.Error("it is handed out under another record")
	}
}

// A JWT-SVID whose entry has changed at the CA first is signed once Sync has brought the
// change, if the caller is entitled under it as before.
func TestJWTWaitsForAChangedRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeCA(time.Hour)
		f.paths["accounts"] = "/accounts"
		a := newAgent(t, f)
		told := entry("accounts", "/accounts", 1)
		hold(a, f, told)
		asked, _ := a.State().Identity("accounts")
		later := proto.CloneOf(told)
		later.Revision, later.Hint = 2, "h"
		time.AfterFunc(5*time.Millisecond, func() { hold(a, f, later) })
		if now, err := a.changed(t.Context(), asked, client.ErrChanged); err != nil || now.Entry.GetRevision() != 2 {
			t.Errorf("control: %v", err)
		}
		hold(a, f, told)
		time.AfterFunc(5*time.Millisecond, func() { hold(a, f, forUser(later, "unix:uid:2000")) })
		if _, err := a.changed(t.Context(), asked, client.ErrChanged); !errors.Is(err, client.ErrChanged) {
			t.Errorf("for other processes: %v", err)
		}
	})
}

// The cache gives back what was signed for the entry as it is; of the release before, which
// kept no hash, what was signed at its revision.
func TestKeptSVIDBelongsToItsRecord(t *testing.T) {
	told := entry("accounts", "/accounts", 7)
	identity := &Identity{Entry: told, record: recordOf(told)}
	hash := recordOf(told).Hash
	lie := recordOf(forUser(told, "unix:uid:2000")).Hash
	for _, c := range []struct {
		name string
		kept *statev1.HeldSVID
		want bool
	}{
		{"control: its own", &statev1.HeldSVID{EntryRevision: 7, Record: hash[:]}, true},
		{"other selectors at the same revision", &statev1.HeldSVID{EntryRevision: 7, Record: lie[:]}, false},
		{"of the release before", &statev1.HeldSVID{EntryRevision: 7}, true},
		{"of the release before, former", &statev1.HeldSVID{EntryRevision: 6}, false},
	} {
		if got := keptFor(identity, c.kept); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}
