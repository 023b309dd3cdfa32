package load

import (
	"math"
	"math/bits"
	"time"
)

// exactBits fixes the resolution: every power of two of microseconds has 2^exactBits
// buckets, so that a value read back is at most 1/128 above the one recorded.
const exactBits = 7

// Histogram counts durations in logarithmic buckets with linear steps inside, as
// HdrHistogram does. Below 128 us it is exact to the microsecond; what is negative
// counts as 0. It is as long as its highest value needs: 7 KiB for a second. The zero
// value is empty and ready.
type Histogram struct {
	counts []uint32
	total  int
}

func bucketOf(d time.Duration) int {
	us := uint64(max(d, 0) / time.Microsecond)
	if us < 1<<exactBits {
		return int(us)
	}
	shift := bits.Len64(us) - 1 - exactBits
	return shift<<exactBits + int(us>>shift)
}

// upperEnd is the longest duration that a bucket holds, to the microsecond.
func upperEnd(bucket int) time.Duration {
	if bucket < 1<<exactBits {
		return time.Duration(bucket) * time.Microsecond
	}
	shift := bucket>>exactBits - 1
	mantissa := bucket - shift<<exactBits
	us := uint64(mantissa+1)<<shift - 1
	if us > math.MaxInt64/uint64(time.Microsecond) {
		return math.MaxInt64
	}
	return time.Duration(us) * time.Microsecond
}

// Add counts one duration.
func (h *Histogram) Add(d time.Duration) {
	bucket := bucketOf(d)
	h.grow(bucket + 1)
	h.counts[bucket]++
	h.total++
}

func (h *Histogram) grow(length int) {
	if missing := length - len(h.counts); missing > 0 {
		h.counts = append(h.counts, make([]uint32, missing)...)
	}
}

// Merge adds what another histogram counted.
func (h *Histogram) Merge(other *Histogram) {
	h.grow(len(other.counts))
	for bucket, n := range other.counts {
		h.counts[bucket] += n
	}
	h.total += other.total
}

// Quantile returns the q-quantile by the nearest rank, q in (0, 1], as the upper end of
// its bucket; 0 if nothing was counted.
func (h *Histogram) Quantile(q float64) time.Duration {
	if h.total == 0 {
		return 0
	}
	rank := min(max(int(math.Ceil(q*float64(h.total))), 1), h.total)
	for bucket, n := range h.counts {
		if rank -= int(n); rank <= 0 {
			return upperEnd(bucket)
		}
	}
	return upperEnd(len(h.counts) - 1)
}
