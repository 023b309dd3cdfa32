package ca

import (
	"errors"
	"fmt"
	"slices"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/selector"
)

const maxScope = 32

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
	if err := selector.CheckAttested(a.GetSelectors()); err != nil {
		return err
	}
	if a.GetGeneration() != 0 || a.GetBanned() {
		return errors.New("a new agent has no generation and is not banned")
	}
	return CheckScope(a.GetPathPrefixes())
}
