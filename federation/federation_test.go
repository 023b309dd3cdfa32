package federation

import (
	"math"
	"net/netip"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

func TestStates(t *testing.T) {
	may := map[[2]State]bool{
		{Proposed, Active}: true, {Proposed, Ended}: true, {Active, Suspended}: true, {Active, Ended}: true, {Suspended, Active}: true, {Suspended, Ended}: true,
	}
	for from := Proposed; from <= Ended; from++ {
		for to := Proposed; to <= Ended; to++ {
			want := may[[2]State{from, to}] || from == to
			if err := from.To(to); (err == nil) != want {
				t.Errorf("%s to %s: %v", from, to, err)
			}
		}
		if from.Trusts() != (from == Active) {
			t.Errorf("%s trusts: %v", from, from.Trusts())
		}
		if from.To(0) == nil || from.To(Ended+1) == nil || State(0).To(from) == nil {
			t.Errorf("%s goes to what is no state", from)
		}
	}
}

// Requirements: 119, 121.
func TestAcceptBundle(t *testing.T) {
	b := func(sequence uint64, jwks string) *statev1.ForeignBundle {
		return &statev1.ForeignBundle{TrustDomain: "trading.example", Sequence: sequence, Jwks: []byte(jwks)}
	}
	for _, test := range []struct {
		name      string
		old, next *statev1.ForeignBundle
		want      Verdict
	}{
		{"first", nil, b(5, "a"), Accepted},
		{"first without a sequence", nil, b(0, "a"), Accepted},
		{"newer", b(5, "a"), b(6, "b"), Accepted},
		{"newer, same contents", b(5, "a"), b(6, "a"), Accepted},
		{"much newer", b(5, "a"), b(math.MaxUint64, "b"), Accepted},
		{"same", b(5, "a"), b(5, "a"), Unchanged},
		{"older", b(5, "a"), b(4, "b"), Older},
		{"older, same contents", b(5, "a"), b(4, "a"), Older},
		{"two of one sequence", b(5, "a"), b(5, "b"), Conflicting},
		{"never a sequence", b(0, "a"), b(0, "b"), Accepted},
		{"never a sequence, same", b(0, "a"), b(0, "a"), Unchanged},
		{"the sequence is left out", b(5, "a"), b(0, "b"), Older},
		{"a sequence begins", b(0, "a"), b(1, "b"), Accepted},
		{"another domain's", b(5, "a"), &statev1.ForeignBundle{TrustDomain: "rogue.example", Sequence: 6}, Foreign},
	} {
		got := AcceptBundle(test.old, test.next)
		if got != test.want || (got.Err() == nil) != (got == Accepted || got == Unchanged) {
			t.Errorf("%s: %d (%v), want %d", test.name, got, got.Err(), test.want)
		}
	}
	if Verdict(0).Err() == nil {
		t.Error("no verdict is a good one")
	}
}

func TestExpired(t *testing.T) {
	at := time.Unix(1000, 0)
	for expires, want := range map[int64]bool{1001: false, 1000: true, 999: true, 0: true, -1: true, math.MaxInt64: false} {
		if Expired(expires, at) != want {
			t.Errorf("%d at 1000 is not %v", expires, want)
		}
	}
	if Expired(1000, time.Unix(999, 999_999_999)) {
		t.Error("it is over a moment too early")
	}
}

func TestCheckAddr(t *testing.T) {
	for _, good := range []string{"10.1.0.1", "192.0.2.1", "100.64.0.1", "2001:db8::1", "fd00::1", "::ffff:10.1.0.1", "64:ff9b::10.1.0.1"} {
		if err := CheckAddr(netip.MustParseAddr(good)); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{
		"127.0.0.1", "127.255.0.1", "::1", "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "fe80::1", "fe80::1%eth0",
		"0.0.0.0", "0.1.2.3", "::", "224.0.0.1", "ff02::1", "255.255.255.255",
	} {
		if CheckAddr(netip.MustParseAddr(bad)) == nil {
			t.Errorf("%s passes", bad)
		}
	}
	for _, good := range []string{"10.1.0.1:443", "[2001:db8::1]:443", "[fd00::1]:443", "[64:ff9b::10.1.0.1]:443", "[64:ff9b:1::10.1.0.1]:443", "[2002:0a01:1::]:443", "[::ffff:10.1.0.1]:443", "[2001:0:a01:1:0:0:f5fe:fffe]:443"} {
		if err := CheckDial(good, false); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{
		"127.0.0.1:443", "[::1]:443", "[::ffff:127.0.0.1]:443", "[::127.0.0.1]:443", "[64:ff9b::7f00:1]:443", "169.254.169.254:80", "[::ffff:169.254.169.254]:80", "[fe80::1%eth0]:443", "0.0.0.0:443", "[::]:443", "224.0.0.1:443", "[ff02::1]:443",
		"[2002:7f00:1::]:443", "[2002:a9fe:a9fe::1]:80", "[64:ff9b:1::7f00:1]:443", "[64:ff9b:1::a9fe:a9fe]:80", "[::ffff:0:127.0.0.1]:443", "[2001:0:a01:1:0:0:80ff:fffe]:443", "[2001:db8::5efe:7f00:1]:443", "[2001:db8::200:5efe:a9fe:a9fe]:443",
		"[fd00:ec2::254]:80", "localhost:443", "127.0.0.1", "",
	} {
		if CheckDial(bad, false) == nil {
			t.Errorf("%s is dialled", bad)
		}
	}
	for address, want := range map[string]bool{"127.0.0.1:443": true, "[::1]:443": true, "[::ffff:127.0.0.1]:443": true, "10.1.0.1:443": true, "169.254.169.254:80": false, "[64:ff9b::a9fe:a9fe]:80": false, "0.0.0.0:443": false} {
		if err := CheckDial(address, true); (err == nil) != want {
			t.Errorf("in a development cluster, %s: %v", address, err)
		}
	}
	if CheckAddr(netip.Addr{}) == nil {
		t.Error("the zero address passes")
	}
}
