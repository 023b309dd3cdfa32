package load

import (
	"slices"
	"testing"
	"time"
)

var t0 = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

func ms(n int) time.Duration { return time.Duration(n) * time.Millisecond }

// at is a good answer that was scheduled at a and came at b, milliseconds after t0.
func at(a, b int, from ...string) Sample {
	return Sample{Scheduled: t0.Add(ms(a)), Done: t0.Add(ms(b)), OK: true, ServedBy: from, Attempts: 1}
}

func bad(a, b int) Sample {
	return Sample{Scheduled: t0.Add(ms(a)), Done: t0.Add(ms(b)), Attempts: 2, Unknown: true, Error: "status 502"}
}

func TestMeasure(t *testing.T) {
	// dc1 dies at 100 ms. One answer of dc1 is on its way and arrives after; one is
	// made by both; then dc2 serves alone.
	clean := []Sample{
		at(0, 5, "dc1"), at(50, 58, "dc1"),
		at(99, 101, "dc1"), at(110, 190, "dc1", "dc2"),
		at(150, 160, "dc2"), at(200, 204, "dc2"), at(250, 255, "dc2"),
	}
	tests := []struct {
		name     string
		samples  []Sample
		end      int
		gap      time.Duration
		switched time.Duration
		failed   int
	}{
		{"clean", clean, 300, ms(160 - 101), ms(204 - 100), 0},
		{"in any order", reversed(clean), 300, ms(160 - 101), ms(204 - 100), 0},
		{"what is scheduled after the end does not count", append(slices.Clone(clean), bad(310, 320)), 300, ms(59), ms(104), 0},
		{"a failure in between", append(slices.Clone(clean), bad(205, 210)), 300, ms(59), ms(155), 1},
		{"a failure at the end is a gap up to there", append(slices.Clone(clean), bad(260, 900)), 300, ms(900 - 255), -1, 1},
		{"gaps before the failure are not its own", []Sample{at(0, 1, "dc1"), at(90, 99, "dc1"), at(110, 111, "dc2")}, 200, ms(12), ms(11), 0},
		{"a gap across the failure counts in full", []Sample{at(0, 1, "dc1"), at(10, 180, "dc2")}, 200, ms(179), ms(80), 0},
		{"never came back", []Sample{at(0, 1, "dc1"), bad(110, 2110)}, 200, ms(2109), -1, 1},
		{"nothing good at all", []Sample{bad(0, 50), bad(110, 150)}, 200, ms(100), -1, 2},
		{"still served by the old one", []Sample{at(0, 1, "dc1"), at(150, 151, "dc1")}, 200, ms(150), -1, 0},
		{"nothing was asked", nil, 200, ms(100), -1, 0},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			r := Measure(test.samples, t0.Add(ms(100)), t0.Add(ms(test.end)), "dc2")
			if r.LongestGap != test.gap || r.Switched != test.switched || r.Failed != test.failed {
				t.Errorf("gap %s, switched %s, failed %d; want %s, %s, %d", r.LongestGap, r.Switched, r.Failed, test.gap, test.switched, test.failed)
			}
		})
	}

	r := Measure(append(slices.Clone(clean), bad(205, 210)), t0.Add(ms(100)), t0.Add(ms(300)), "dc2")
	if r.Requests != 8 || r.Attempts != 9 || r.Unknown != 1 || r.Errors["status 502"] != 1 {
		t.Errorf("counts: %+v", r)
	}
	if r.Before["dc1"] != 2 || r.Before["dc2"] != 0 || r.After["dc1"] != 2 || r.After["dc2"] != 4 {
		t.Errorf("served: before %v, after %v", r.Before, r.After)
	}
	if r.P50 != ms(5) || r.P99 != ms(80) || r.Max != ms(80) {
		t.Errorf("p50 %s, p99 %s, max %s", r.P50, r.P99, r.Max)
	}
}

func reversed(list []Sample) []Sample {
	list = slices.Clone(list)
	slices.Reverse(list)
	return list
}

func TestQuantile(t *testing.T) {
	list := []time.Duration{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}
	for _, test := range []struct {
		q    float64
		want time.Duration
	}{{0.0001, 1}, {0.1, 1}, {0.11, 2}, {0.5, 5}, {0.99, 10}, {1, 10}} {
		if got := Quantile(list, test.q); got != test.want {
			t.Errorf("Quantile(%v) = %d, want %d", test.q, got, test.want)
		}
	}
	if Quantile(nil, 0.5) != 0 {
		t.Error("the quantile of nothing is not 0")
	}
}

func TestDue(t *testing.T) {
	samples := []Sample{at(25, 30, "dc1"), at(0, 5, "dc1"), at(75, 80, "dc1")}
	for _, test := range []struct{ before, due, recorded int }{
		{0, 0, 0}, {1, 1, 1}, {25, 1, 1}, {26, 2, 2}, {75, 3, 2}, {76, 4, 3}, {100, 4, 3}, {101, 5, 3},
	} {
		due, recorded := Due(samples, 40, t0.Add(ms(test.before)))
		if due != test.due || recorded != test.recorded {
			t.Errorf("before %d ms: %d due, %d recorded; want %d, %d", test.before, due, recorded, test.due, test.recorded)
		}
	}
	if due, recorded := Due(nil, 40, t0); due <= recorded {
		t.Error("a load that has recorded nothing yet counts as complete")
	}
}

func TestShare(t *testing.T) {
	samples := []Sample{at(0, 5, "dc1"), at(100, 120, "dc1"), at(105, 108, "dc1"), at(110, 115, "dc1", "dc2"), at(120, 125, "dc2"), bad(130, 140)}
	got := Share(samples, t0.Add(ms(100)), "dc1")
	if len(got) != 2 || got[0].Done != t0.Add(ms(108)) {
		t.Errorf("share: %v", got)
	}
}
