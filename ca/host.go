package ca

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// Kinds of node selectors: by whose word a host has them. What follows is free:
// token:rack:r1, x509pop:subject:cn:h1.dc1.example.
const (
	NodeByToken   = "token"   // the operator's, who made the join token
	NodeByX509PoP = "x509pop" // of who signed the host's own certificate
)

const (
	maxNodeSelectors = 64
	maxNodeSelector  = 512
	maxScope         = 32
)

// CheckNodeSelectors refuses what no host can have by the word of one of the kinds; none
// given: of any.
func CheckNodeSelectors(list []string, kinds ...string) error {
	if len(kinds) == 0 {
		kinds = []string{NodeByToken, NodeByX509PoP}
	}
	if n := len(list); n > maxNodeSelectors {
		return fmt.Errorf("%d node selectors, over %d", n, maxNodeSelectors)
	}
	for _, text := range list {
		kind, value, _ := strings.Cut(text, ":")
		switch {
		case !slices.Contains(kinds, kind) || value == "":
			return fmt.Errorf("node selector %.80q does not begin with %s: and a value behind it", text, strings.Join(kinds, ": or "))
		case len(text) > maxNodeSelector:
			return fmt.Errorf("node selector %.80q... has over %d bytes", text, maxNodeSelector)
		case !utf8.ValidString(text) || strings.ContainsFunc(text, unicode.IsControl):
			return fmt.Errorf("node selector %.80q is not text on one line", text)
		}
	}
	return nil
}

// CheckScope refuses prefixes that are no SPIFFE paths, and reserved ones.
func CheckScope(prefixes []string) error {
	if n := len(prefixes); n > maxScope {
		return fmt.Errorf("%d path prefixes, over %d", n, maxScope)
	}
	for _, prefix := range prefixes {
		if err := CheckPath(prefix); err != nil {
			return fmt.Errorf("path prefix: %w", err)
		}
	}
	return nil
}

// Entitled tells whether an attested host may hold an entry: it is not banned, the entry
// names it, it has what the entry demands of a host, and the entry lies within its scope.
func Entitled(host *statev1.Agent, e *statev1.Entry) bool {
	return host.GetName() != "" && !host.GetBanned() && slices.Contains(e.GetHosts(), host.GetName()) &&
		!slices.ContainsFunc(e.GetNodeSelectors(), func(s string) bool { return !slices.Contains(host.GetSelectors(), s) }) &&
		InScope(host, e.GetPath())
}

// InScope tells whether a host may hold identities at a SPIFFE path at all.
func InScope(host *statev1.Agent, path string) bool {
	return len(host.GetPathPrefixes()) == 0 || slices.ContainsFunc(host.GetPathPrefixes(), func(prefix string) bool { return AtOrBelow(path, prefix) })
}

// CheckHostAddresses refuses what is no list of hosts at which a sidecar may be reached.
func CheckHostAddresses(addresses []string) error {
	if n := len(addresses); n > maxAddresses {
		return fmt.Errorf("%d addresses, over %d", n, maxAddresses)
	}
	for _, host := range addresses {
		if err := CheckHost(host); err != nil {
			return err
		}
	}
	return nil
}

const maxAddresses = 16

// CheckAgent refuses an agent's record, as a door proposes it, that could not stand in
// the agreed state.
func CheckAgent(a *statev1.Agent) error {
	if err := CheckLabel(a.GetName()); err != nil {
		return err
	}
	if err := CheckLabel(a.GetDatacenter()); err != nil {
		return fmt.Errorf("datacenter: %w", err)
	}
	if err := CheckKeyID(a.GetKeyId()); err != nil {
		return err
	}
	if err := CheckKeyID(a.GetCertificate()); err != nil {
		return fmt.Errorf("certificate: %w", err)
	}
	if err := CheckHostAddresses(a.GetAddresses()); err != nil {
		return err
	}
	if err := CheckNodeSelectors(a.GetSelectors(), NodeByX509PoP); err != nil {
		return err
	}
	if a.GetGeneration() != 0 || a.GetBanned() {
		return errors.New("a new agent has no generation and is not banned")
	}
	return CheckScope(a.GetPathPrefixes())
}
