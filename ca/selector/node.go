package selector

import (
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Names of the kinds of node selectors: by whose word a host has them. What follows is
// free: token:rack:r1, x509pop:subject:cn:h1.dc1.example.
const (
	Token   = "token"
	X509PoP = "x509pop"
)

// NodeKind is what is known of one kind of node selectors.
type NodeKind struct {
	Name string
	Word string // by whose word a host has one
	// Attested: by evidence that a CA node verified, not by an operator's word.
	Attested bool
}

var nodeKinds = []NodeKind{
	{Token, "the operator who made the host's join token (`token create --selector`)", false},
	{X509PoP, "who signed the host's own certificate", true},
}

const (
	// MaxNodeCount is how many node selectors a host has, or an entry demands.
	MaxNodeCount = 64
	// MaxNodeLength is the length of the longest node selector in bytes.
	MaxNodeLength = 512
)

// NodeKinds are all kinds of node selectors there are.
func NodeKinds() []NodeKind { return slices.Clone(nodeKinds) }

// CheckAttested refuses node selectors that no attestor gives.
func CheckAttested(list []string) error {
	var kinds []string
	for _, kind := range nodeKinds {
		if kind.Attested {
			kinds = append(kinds, kind.Name)
		}
	}
	return CheckNode(list, kinds...)
}

// CheckNode refuses what no host can have by the word of one of the kinds; none given: of
// any.
func CheckNode(list []string, kinds ...string) error {
	if len(kinds) == 0 {
		for _, kind := range nodeKinds {
			kinds = append(kinds, kind.Name)
		}
	}
	if n := len(list); n > MaxNodeCount {
		return fmt.Errorf("%d node selectors, over %d", n, MaxNodeCount)
	}
	for _, text := range list {
		kind, value, _ := strings.Cut(text, ":")
		switch {
		case !slices.Contains(kinds, kind) || value == "":
			return fmt.Errorf("node selector %.80q does not begin with %s: and a value behind it", text, strings.Join(kinds, ": or "))
		case len(text) > MaxNodeLength:
			return fmt.Errorf("node selector %.80q... has over %d bytes", text, MaxNodeLength)
		case !utf8.ValidString(text) || strings.ContainsFunc(text, unicode.IsControl):
			return fmt.Errorf("node selector %.80q is not text on one line", text)
		}
	}
	return nil
}
