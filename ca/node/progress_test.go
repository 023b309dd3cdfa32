package node

import (
	"testing"
	"time"
)

// A follower that hears its leader and stands still while the log grows is stuck after
// five seconds; one that moves, lacks nothing, or is not in contact is not.
func TestStandstill(t *testing.T) {
	start := time.Now()
	type look struct {
		after       time.Duration
		match, last uint64
		contact     time.Duration // before the look
	}
	for name, c := range map[string]struct {
		looks []look
		stuck bool
	}{
		"stands still":        {[]look{{0, 7, 9, 0}, {3 * time.Second, 7, 20, 0}, {5 * time.Second, 7, 30, 0}}, true},
		"for too short":       {[]look{{0, 7, 9, 0}, {4 * time.Second, 7, 30, 0}}, false},
		"moves":               {[]look{{0, 7, 9, 0}, {3 * time.Second, 8, 20, 0}, {6 * time.Second, 9, 30, 0}}, false},
		"lacks nothing":       {[]look{{0, 9, 9, 0}, {6 * time.Second, 9, 9, 0}}, false},
		"is not in contact":   {[]look{{0, 7, 9, 0}, {3 * time.Second, 7, 20, 2 * time.Second}, {6 * time.Second, 7, 30, 0}}, false},
		"catches up meantime": {[]look{{0, 7, 9, 0}, {4 * time.Second, 9, 9, 0}, {6 * time.Second, 9, 10, 0}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			var s standstill
			stuck := false
			for _, l := range c.looks {
				now := start.Add(l.after)
				stuck = s.stuck("x", l.match, l.last, now.Add(-l.contact), now)
			}
			if stuck != c.stuck {
				t.Errorf("stuck: %v", stuck)
			}
		})
	}
}
