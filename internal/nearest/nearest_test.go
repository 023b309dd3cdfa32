package nearest

import (
	"strings"
	"testing"
)

func TestWord(t *testing.T) {
	words := []string{"export", "expires", "port", "failover", "a"}
	for word, want := range map[string]string{
		"expot": "export", "exprot": "export", "EXPORT": "export", "prot": "port", "faillover": "failover", "exprires": "expires", "xyz": "", "": "", "b": "a",
		strings.Repeat("x", 1000): "",
	} {
		if got := Word(word, words); got != want {
			t.Errorf("Word(%q) = %q, want %q", word, got, want)
		}
	}
	if got := Word("abd", []string{"abz", "abc"}); got != "abc" {
		t.Errorf("a tie goes to %q", got)
	}
}
