package ca

import (
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

var banking = spiffeid.RequireTrustDomainFromString("banking.example")

func TestRevision(t *testing.T) {
	for _, test := range []struct {
		epoch uint32
		index uint64
		text  string
	}{{0, 0, "0.0"}, {0, 8812, "0.8812"}, {1, 1, "1.1"}, {MaxEpoch, MaxIndex, "511.17592186044415"}} {
		r, err := NewRevision(test.epoch, test.index)
		if err != nil {
			t.Fatal(err)
		}
		if r.String() != test.text || r.Epoch() != test.epoch || r.Index() != test.index {
			t.Errorf("%d.%d: got %s, epoch %d, index %d", test.epoch, test.index, r, r.Epoch(), r.Index())
		}
		if back, err := ParseRevision(test.text); err != nil || back != r {
			t.Errorf("parse %s: %v, %v", test.text, back, err)
		}
		if float64(r) != float64(uint64(r)) || uint64(float64(r)) != uint64(r) {
			t.Errorf("%s does not survive a float64", r)
		}
	}
	if _, err := NewRevision(MaxEpoch+1, 0); err == nil {
		t.Error("epoch 512 accepted")
	}
	if _, err := NewRevision(0, MaxIndex+1); err == nil {
		t.Error("index 2^44 accepted")
	}
	for _, text := range []string{"", "0", ".", "1.", ".1", "-1.0", "512.0", "0.17592186044416", "1.2.3", "0x1.2"} {
		if r, err := ParseRevision(text); err == nil {
			t.Errorf("%q parsed as %s", text, r)
		}
	}
	later, _ := NewRevision(1, 0)
	earlier, _ := NewRevision(0, MaxIndex)
	if later <= earlier {
		t.Error("a new epoch does not come after the old one")
	}
}

func TestLabels(t *testing.T) {
	for _, good := range []string{"a", "0", "accounts", "gw-1", strings.Repeat("a", 63)} {
		if err := CheckLabel(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range []string{"", "-a", "a-", "A", "a.b", "a_b", "ä", "a b", "a/b", strings.Repeat("a", 64)} {
		if CheckLabel(bad) == nil {
			t.Errorf("%q accepted", bad)
		}
	}
}

// Requirements: 8-14, T12.
func TestIDs(t *testing.T) {
	long := "/" + strings.Repeat("a", MaxID)
	fits := "/" + strings.Repeat("a", MaxID-len("spiffe://banking.example/"))
	for _, path := range []string{"/accounts", "/a/b", "/A_b.c-D", fits} {
		if _, err := ID(banking, path); err != nil {
			t.Errorf("%.40q: %v", path, err)
		}
	}
	for _, path := range []string{"", "/", "accounts", "/a/", "//a", "/a/../b", "/./a", "/a%20b", "/a?b", "/a#", "/a#b", "/ä", fits + "a", long} {
		if id, err := ID(banking, path); err == nil {
			t.Errorf("%.40q gave %.40s", path, id)
		}
	}
	if _, err := ID(spiffeid.TrustDomain{}, "/a"); err == nil {
		t.Error("no trust domain accepted")
	}
	// The longest legal trust domain.
	td, err := ParseTrustDomain(strings.Repeat("a", MaxTrustDomain))
	if err != nil {
		t.Error(err)
	}
	if _, err := ID(td, "/a"); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"", strings.Repeat("a", MaxTrustDomain+1), "A.example", "spiffe://a.example", "a.example/b", "a:1", "a@b", "%61"} {
		if td, err := ParseTrustDomain(bad); err == nil {
			t.Errorf("%.40q gave %s", bad, td)
		}
	}
}

func TestReserved(t *testing.T) {
	for _, path := range []string{"/entente", "/entente/ca/n1", NodePath("x"), AgentPath("x"), GatewayPath("x"), BundleEndpointPath} {
		if !Reserved(path) {
			t.Errorf("%s is not reserved", path)
		}
	}
	for _, path := range []string{"/ententes", "/a/entente", "/Entente/ca"} {
		if Reserved(path) {
			t.Errorf("%s is reserved", path)
		}
	}
}

func TestAddresses(t *testing.T) {
	for _, good := range []string{"127.1.0.1:7443", "[::1]:1", "ca-1.banking.example:65535", "localhost:80"} {
		if err := CheckAddress(good); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"", "a", ":80", "a:0", "a:65536", "a:http", "a b:1", "A:1", "::1:80", "a:1:2", "_a:1"} {
		if CheckAddress(bad) == nil {
			t.Errorf("%q accepted", bad)
		}
	}
}

func TestLifetimes(t *testing.T) {
	if l := LifetimesOf(nil); l.X509SVID != 12*time.Hour || l.AgentSVID != 12*time.Hour || l.Phase != 48*time.Hour || l.RefreshHint != 5*time.Minute || l.Check() != nil {
		t.Errorf("defaults: %+v, %v", l, l.Check())
	}
	l := LifetimesOf(&statev1.Lifetimes{X509SvidSeconds: 16, PhaseSeconds: 60})
	if l.X509SVID != 16*time.Second || l.AgentSVID != 16*time.Second || l.Phase != time.Minute || l.Check() != nil {
		t.Errorf("given: %+v, %v", l, l.Check())
	}
	if l := LifetimesOf(&statev1.Lifetimes{PhaseSeconds: 60}); l.X509SVID != time.Minute || l.Check() != nil {
		t.Errorf("short phase: %+v, %v", l, l.Check())
	}
	for name, bad := range map[string]*statev1.Lifetimes{
		"SVID outlives the phase":  {X509SvidSeconds: 61, PhaseSeconds: 60},
		"agent outlives the phase": {AgentSvidSeconds: 61, PhaseSeconds: 60},
		"too short to renew":       {X509SvidSeconds: 1},
		"phase over a year":        {PhaseSeconds: 366 * 24 * 3600},
		"hint over a day":          {BundleRefreshHintSeconds: 24*3600 + 1},
	} {
		if LifetimesOf(bad).Check() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestPhases(t *testing.T) {
	type phase = statev1.AuthorityPhase
	const (
		none     = statev1.AuthorityPhase_AUTHORITY_PHASE_UNSPECIFIED
		prepared = statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED
		active   = statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE
		retired  = statev1.AuthorityPhase_AUTHORITY_PHASE_RETIRED
		tainted  = statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED
		revoked  = statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED
	)
	legal := map[[2]phase]bool{
		{prepared, active}: true, {prepared, retired}: true, {prepared, tainted}: true, {prepared, revoked}: true,
		{active, retired}: true, {active, tainted}: true, {active, revoked}: true,
		{retired, tainted}: true, {retired, revoked}: true,
		{tainted, revoked}: true,
	}
	all := []phase{none, prepared, active, retired, tainted, revoked, 17}
	for _, from := range all {
		for _, to := range all {
			if MayMove(from, to) != legal[[2]phase{from, to}] {
				t.Errorf("%s to %s: %v", from, to, MayMove(from, to))
			}
		}
		if Signs(from) != (from == active) {
			t.Errorf("%s signs: %v", from, Signs(from))
		}
		if InBundle(from) != (from == prepared || from == active || from == retired || from == tainted) {
			t.Errorf("%s in the bundle: %v", from, InBundle(from))
		}
	}
	now := time.Unix(1000, 0)
	good := &statev1.Authority{Phase: prepared, Ready: true, NotAfter: 1001}
	if err := MayActivate(good, now); err != nil {
		t.Error(err)
	}
	for name, a := range map[string]*statev1.Authority{
		"not ready": {Phase: prepared, NotAfter: 1001},
		"ended":     {Phase: prepared, Ready: true, NotAfter: 1000},
		"retired":   {Phase: retired, Ready: true, NotAfter: 1001},
		"revoked":   {Phase: revoked, Ready: true, NotAfter: 1001},
		"nothing":   nil,
	} {
		if MayActivate(a, now) == nil {
			t.Errorf("%s: may activate", name)
		}
	}
}
