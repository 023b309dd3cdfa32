package admission

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// hold takes n places for a source and says how many it got, and how many of them it
// lost since.
func hold(p *Places, source string, n int) (got int, lost *int) {
	lost = new(int)
	for range n {
		if p.Take(source, time.Now(), func() { *lost++ }) != nil {
			got++
		}
	}
	return got, lost
}

// One source cannot keep others out, whatever it holds.
func TestOneSourceKeepsNobodyOut(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := NewPlaces(Limits{Most: 100, Patience: time.Hour})
		if got, _ := hold(p, "greedy", 500); got != 100 {
			t.Fatalf("control: it got %d of 100", got)
		}
		for i := range 40 {
			if got, lost := hold(p, fmt.Sprint("newcomer", i), 2); got != 2 || *lost != 0 {
				t.Fatalf("newcomer %d got %d places", i, got)
			}
		}
		if p.Len() != 100 {
			t.Errorf("%d places are held", p.Len())
		}
	})
}

// A source has a share: its next connection takes the place of its own oldest, when that
// has had its time, and nobody else's.
func TestShareOfASource(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := NewPlaces(Share(100, time.Second))
		got, lost := hold(p, "greedy", 100)
		if got != 25 || *lost != 0 {
			t.Fatalf("it got %d, lost %d", got, *lost)
		}
		if got, _ := hold(p, "other", 25); got != 25 {
			t.Fatalf("control: another got %d", got)
		}
		time.Sleep(time.Second)
		if again, _ := hold(p, "greedy", 3); again != 3 || *lost != 3 || p.Len() != 50 {
			t.Errorf("a second later it got %d, lost %d of %d", again, *lost, p.Len())
		}

		kept := NewPlaces(Limits{Most: 8, PerSource: 2, Patience: Never})
		hold(kept, "a", 2)
		time.Sleep(1000 * time.Hour)
		if got, _ := hold(kept, "a", 1); got != 0 {
			t.Error("a place that is never given away was")
		}
	})
}

func TestPlaceIsLeftOnce(t *testing.T) {
	t.Parallel()
	p := NewPlaces(Limits{Most: 2, Patience: Never})
	one := p.Take("a", time.Now(), func() {})
	two := p.Take("a", time.Now(), func() { t.Error("it was taken away") })
	if two == nil || p.Take("a", time.Now(), func() {}) != nil {
		t.Fatal("control")
	}
	one.Leave()
	one.Leave()
	if p.Len() != 1 || p.Take("b", time.Now(), func() {}) == nil {
		t.Errorf("%d are held", p.Len())
	}
}

func TestSource(t *testing.T) {
	t.Parallel()
	for address, want := range map[string]string{
		"192.0.2.7:80": "192.0.2.7", "[::ffff:192.0.2.7]:80": "192.0.2.7",
		"[2001:db8:1:2:3:4:5:6]:80": "2001:db8:1:2::/64", "[2001:db8:1:2:ffff::1]:9": "2001:db8:1:2::/64", "[fe80::1%eth0]:80": "fe80::/64",
	} {
		if got := Source(net.TCPAddrFromAddrPort(netip.MustParseAddrPort(address))); got != want {
			t.Errorf("%s: %s, want %s", address, got, want)
		}
	}
}

func TestRate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := NewRate(10, 5, MaxSources)
		take := func(source string, n int) (passed int) {
			for range n {
				if r.Take(source, 1, time.Now()) == 0 {
					passed++
				}
			}
			return passed
		}
		if n := take("a", 100); n != 5 {
			t.Errorf("%d passed", n)
		}
		if n := take("b", 5); n != 5 {
			t.Errorf("control: %d of another source passed", n)
		}
		if wait := r.Take("a", 1, time.Now()); wait <= 0 || wait > 100*time.Millisecond {
			t.Errorf("told to wait %v", wait)
		}
		time.Sleep(time.Second)
		if n := take("a", 100); n != 5 {
			t.Errorf("a second later %d passed", n)
		}
		// However many sources come, no more are remembered than there is room for, and
		// those that are quiet make room.
		for i := range 2 * MaxSources {
			r.Take(fmt.Sprint(i), 1, time.Now())
		}
		if len(r.sources) > MaxSources {
			t.Errorf("%d sources are remembered", len(r.sources))
		}
		known := NewRate(10, 5, 0)
		for i := range 2 * MaxSources {
			if known.Take(fmt.Sprint(i), 5, time.Now()) != 0 {
				t.Fatal("without a bound a source shares another's rate")
			}
		}
		time.Sleep(2 * time.Second)
		if take("late", 1) != 1 || len(r.sources) > 10 {
			t.Errorf("%d sources are remembered long after", len(r.sources))
		}
	})
}
