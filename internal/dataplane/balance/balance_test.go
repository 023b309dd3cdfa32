package balance

import (
	"math/rand/v2"
	"testing"
)

func TestLeastRequest(t *testing.T) {
	if LeastRequest(0, nil, nil) != -1 || LeastRequest(1, nil, nil) != 0 {
		t.Error("none, one")
	}
	load := make([]int64, 10)
	draw := rand.New(rand.NewPCG(1, 2)).IntN
	for range 10000 {
		load[LeastRequest(len(load), func(i int) int64 { return load[i] }, draw)]++
	}
	for i, n := range load {
		if n < 990 || n > 1010 {
			t.Errorf("%d got %d of 10000: two choices keep it even", i, n)
		}
	}
}
