package selector

import (
	"slices"
	"strings"
	"testing"
)

func TestNodeSelectors(t *testing.T) {
	for text, ok := range map[string]bool{
		"token:pci": true, "x509pop:subject:cn:a b": true, "token:": false, "token": false, "unix:uid:1": false, "token:a\nb": false, "": false, "token:\xff": false,
	} {
		if err := CheckNode([]string{text}); (err == nil) != ok {
			t.Errorf("%q: %v", text, err)
		}
	}
	text := "token:" + strings.Repeat("x", MaxNodeLength-len("token:"))
	if err := CheckNode(slices.Repeat([]string{text}, MaxNodeCount)); err != nil {
		t.Errorf("as many and as long as there may be: %v", err)
	}
	if CheckNode([]string{text + "x"}) == nil || CheckNode(slices.Repeat([]string{"token:x"}, MaxNodeCount+1)) == nil {
		t.Error("no bounds")
	}
	for _, kind := range NodeKinds() {
		for _, other := range NodeKinds() {
			if err := CheckNode([]string{kind.Name + ":x"}, other.Name); (err == nil) != (kind == other) {
				t.Errorf("%s by the word of %s: %v", kind.Name, other.Name, err)
			}
		}
	}
}
