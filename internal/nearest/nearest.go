// Package nearest finds the name that a misspelled one was probably meant to be.
package nearest

import (
	"math"
	"slices"
	"strings"
)

// Word returns the word of words that word was probably meant to be, or "" if
// none is near: case apart, at most one edit for each three letters (an edit
// inserts, removes, replaces a letter or swaps two neighbours). The first in
// alphabetical order wins a tie.
func Word(word string, words []string) string {
	const longest = 64
	if word == "" || len(word) > longest {
		return ""
	}
	best, bestDistance := "", math.MaxInt
	for _, candidate := range slices.Sorted(slices.Values(words)) {
		if len(candidate) > longest {
			continue
		}
		most := max(1, max(len(word), len(candidate))/3)
		if d := distance(strings.ToLower(word), strings.ToLower(candidate)); d <= most && d < bestDistance {
			best, bestDistance = candidate, d
		}
	}
	return best
}

// distance is the optimal string alignment distance in bytes.
func distance(a, b string) int {
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(b)]
}
