// Package balance chooses among equals.
package balance

// LeastRequest picks one of n by the power of two choices: of two drawn at random
// the one with less load (Mitzenmacher, "The Power of Two Choices in Randomized
// Load Balancing", 2001). draw(k) returns a number in [0, k). It returns -1 if n is 0.
func LeastRequest(n int, load func(i int) int64, draw func(k int) int) int {
	switch n {
	case 0:
		return -1
	case 1:
		return 0
	}
	a := draw(n)
	b := draw(n - 1)
	if b >= a {
		b++ // never the same twice
	}
	if load(b) < load(a) {
		return b
	}
	return a
}
