package admission

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

func TestFold(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := NewFold(time.Minute, 3)
		say := func(kind string, n int) (said, unsaid int) {
			for range n {
				if more, ok := f.Say(kind, time.Now()); ok {
					said, unsaid = said+1, unsaid+more
				}
			}
			return said, unsaid
		}
		if said, _ := say("a", 1000); said != 3 {
			t.Errorf("%d lines at once", said)
		}
		if said, _ := say("b", 1); said != 1 {
			t.Error("control: another kind has no line")
		}
		time.Sleep(90 * time.Second)
		if said, unsaid := say("a", 1000); said != 1 || unsaid != 997 {
			t.Errorf("90 s later %d lines, which tell of %d", said, unsaid)
		}
		time.Sleep(30 * time.Second) // the rest of the period before counts
		if said, unsaid := say("a", 1000); said != 1 || unsaid != 999 {
			t.Errorf("after two minutes %d lines, which tell of %d", said, unsaid)
		}
		time.Sleep(time.Hour)
		if said, _ := say("a", 1000); said != 3 {
			t.Errorf("%d lines an hour later", said)
		}
	})
}

// However many kinds there are, no more are remembered than there is room for.
func TestFoldIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		closed, open := NewFold(time.Minute, 1), NewOpenFold(time.Minute, 1)
		saidClosed, saidOpen := 0, 0
		const kinds = 2 * maxFolded
		for i := range kinds {
			if _, ok := closed.Say(fmt.Sprint(i), time.Now()); ok {
				saidClosed++
			}
			if _, ok := open.Say(fmt.Sprint(i), time.Now()); ok {
				saidOpen++
			}
		}
		if saidClosed != maxFolded || saidOpen != kinds || len(closed.kinds) > maxFolded || len(open.kinds) > maxFolded {
			t.Errorf("of %d kinds %d and %d were said, %d and %d are remembered", kinds, saidClosed, saidOpen, len(closed.kinds), len(open.kinds))
		}
		time.Sleep(time.Minute)
		if _, ok := closed.Say("late", time.Now()); !ok || len(closed.kinds) != 1 {
			t.Errorf("a minute later a new kind is said: %v; %d are remembered", ok, len(closed.kinds))
		}
	})
}
