package meshagent

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/ca/selector"
	"github.com/entente-mesh/entente/federation/bundle"
	"github.com/entente-mesh/entente/meshagent/services"
	"github.com/entente-mesh/entente/meshagent/workloadattest"
)

// State is everything the agent holds at one moment. It and all in it are
// immutable; the next state takes its place.
type State struct {
	// Ready: the agent is attested and has the CA's first complete picture.
	Ready bool
	// View is the CA's picture, as it was when it last changed. Never nil.
	View *client.View
	// Bundle is the own trust domain's; nil before the first attestation.
	Bundle *x509bundle.Bundle
	// Foreign are the bundles of the trust domains that entries of this host
	// federate with.
	Foreign map[spiffeid.TrustDomain]*x509bundle.Bundle
	// JWT and WIT are the own trust domain's token keys; nil before the first picture.
	JWT, WIT *TokenBundle
	// Identities are the entries of this host, by entry id.
	Identities []*Identity
	// Services are those of this host that listen, by name.
	Services []Service

	foreignJWT, foreignWIT map[spiffeid.TrustDomain]*TokenBundle
	witPeers               map[string]bool // trust domains that WIT keys are exchanged with

	registered *services.Snapshot // what Services were made with

	unread error // why the own bundle of View is not Bundle; nil: it is

	own      *x509svid.SVID // the agent's; nil before attestation
	underIDs []string       // of all SVIDs here: key ids of their authorities, sorted
	content  uint64         // counts the states that differ in identities, SVIDs or bundles
	changed  chan struct{}
	reissued chan struct{} // nil in a state under construction: identities or bundles are other ones
}

// Identity is one entry of this host with what its workload gets.
type Identity struct {
	Entry *statev1.Entry
	ID    spiffeid.ID
	SVID  *X509SVID // nil until the CA has signed one
	// Federated are the bundles of the foreign trust domains that the entry
	// federates with by name (I6), by trust domain.
	Federated []*x509bundle.Bundle
	// FederatedJWT and FederatedWIT are their token keys. WIT keys of a domain are only
	// there if the relationship with it says so.
	FederatedJWT, FederatedWIT []*TokenBundle
	// WIT is nil until the CA has signed one, and while WIT-SVIDs are switched off.
	WIT *WITSVID

	// Demands are the selectors that a process must satisfy: the entry's, and while what is
	// held was signed for another record of it, that record's too. None: no process does.
	Demands []string

	record    *record
	selectors []selector.Selector // Demands; none, or one of a later release: no process satisfies it
}

// Own is the agent's SVID, with its authorities after it; nil before attestation.
func (s *State) Own() *x509svid.SVID { return s.own }

// lacking says what the agent still lacks to serve, nil if nothing.
func (s *State) lacking() error {
	if s.own == nil {
		return errors.New("the agent has no SVID yet: it has not attested to a CA node")
	}
	if !s.Ready {
		return errors.New("the CA has not told yet which entries this host has")
	}
	for _, identity := range s.Identities {
		if identity.SVID == nil {
			return fmt.Errorf("there is no SVID yet for %s", identity.ID)
		}
	}
	return nil
}

// Changed is closed when there is a newer state.
func (s *State) Changed() <-chan struct{} { return s.changed }

// Reissued is closed when there is a state with other identities, SVIDs or
// bundles, or when the agent has become ready: not with every state.
func (s *State) Reissued() <-chan struct{} { return s.reissued }

// Identity finds an entry of this host.
func (s *State) Identity(entryID string) (*Identity, bool) {
	i, found := slices.BinarySearchFunc(s.Identities, entryID, func(i *Identity, id string) int {
		return strings.Compare(i.Entry.GetId(), id)
	})
	if !found {
		return nil, false
	}
	return s.Identities[i], true
}

// Service finds the identity of a service of this host.
func (s *State) Service(name string) (*Identity, bool) { return s.Identity(ca.ServiceEntry(name)) }

// IdentitiesOf returns the identities whose selectors the process satisfies, all
// of them, by entry id.
func (s *State) IdentitiesOf(p *workloadattest.Process) []*Identity {
	var entitled []*Identity
	glance := p.Glance()
	for _, identity := range s.Identities {
		if glance.Satisfies(identity.selectors) == nil {
			entitled = append(entitled, identity)
		}
	}
	return entitled
}

// Entries are the entries of this host, by entry id: those of the CA's that are
// for it.
func (s *State) Entries() []*statev1.Entry {
	entries := make([]*statev1.Entry, len(s.Identities))
	for i, identity := range s.Identities {
		entries[i] = identity.Entry
	}
	return entries
}

// withView makes the state that follows from a newer picture of the CA. Where the bundle of
// the own domain cannot be read, the one before stays, everything else is taken, above all
// what restricts, and the error says so: the picture is not to be acknowledged. An entry
// that is not for this host, or a foreign bundle that cannot be read, is left out
// (of a bundle the one before stays), and a complaint says so. Nil: the picture is
// the same but for its revision.
func (s *State) withView(view *client.View, domain spiffeid.TrustDomain, agent string) (_ *State, complaints []error, _ error) {
	known := s.Ready && s.unread == nil && view.Changed == s.View.Changed && view.Urgent == s.View.Urgent
	if known && slices.Equal(view.Instances, s.View.Instances) && slices.Equal(view.Skipped, s.View.Skipped) {
		return nil, nil, nil
	}
	next := *s
	next.Ready, next.View = true, view
	if known {
		return &next, nil, nil
	}
	next.reissued = nil
	next.unread = nil
	if bundlesDiffer(s.View.Bundles, view.Bundles) || s.Bundle == nil || s.unread != nil {
		if next.unread = next.takeOwn(domain, view.Bundles[domain.Name()]); next.unread != nil && !s.Ready {
			return nil, nil, next.unread
		}
		next.Foreign = map[spiffeid.TrustDomain]*x509bundle.Bundle{}
		next.foreignJWT = map[spiffeid.TrustDomain]*TokenBundle{}
		next.foreignWIT = map[spiffeid.TrustDomain]*TokenBundle{}
		for name, jwks := range view.Bundles {
			td, err := spiffeid.TrustDomainFromString(name)
			if err != nil || td == domain {
				continue
			}
			if err := next.takeForeign(td, jwks); err != nil {
				complaints = append(complaints, err)
				if before := s.Foreign[td]; before != nil {
					next.Foreign[td], next.foreignJWT[td], next.foreignWIT[td] = before, s.foreignJWT[td], s.foreignWIT[td]
				}
			}
		}
	}

	next.Identities = make([]*Identity, 0, len(view.Entries))
	next.witPeers = witPeers(view)
	for _, entry := range view.Entries {
		before, _ := s.Identity(entry.GetId())
		identity, err := next.identify(entry, before, domain, agent)
		if err != nil {
			complaints = append(complaints, err)
			continue
		}
		next.Identities = append(next.Identities, identity)
	}
	return &next, complaints, next.unread
}

// takeOwn takes in the own domain's bundle, as a whole or not at all.
func (s *State) takeOwn(domain spiffeid.TrustDomain, jwks []byte) error {
	own, err := parseBundle(domain, jwks)
	if err != nil {
		return err
	}
	jwt, wit, err := tokenBundles(own)
	if err == nil {
		s.Bundle, s.JWT, s.WIT = own.X509Bundle(), jwt, wit
	}
	return err
}

// identify makes an identity of an entry, with what is held for the one before (nil: there
// is none), and refuses one outside of what this agent is for.
func (s *State) identify(entry *statev1.Entry, before *Identity, domain spiffeid.TrustDomain, agent string) (*Identity, error) {
	if !slices.Contains(entry.GetHosts(), agent) {
		return nil, fmt.Errorf("the CA sent entry %q, which is for other hosts (%s): left out", entry.GetId(), strings.Join(entry.GetHosts(), ", "))
	}
	id, err := ca.ID(domain, entry.GetPath())
	if err != nil {
		return nil, fmt.Errorf("the CA sent entry %q, which is left out: %w", entry.GetId(), err)
	}
	if ca.Reserved(entry.GetPath()) && entry.GetRole() != statev1.Role_ROLE_GATEWAY {
		return nil, fmt.Errorf("the CA sent entry %q with the reserved path %s: left out", entry.GetId(), entry.GetPath())
	}
	identity := &Identity{Entry: entry, ID: id}
	if before != nil && before.Entry == entry {
		identity.record = before.record // hashing all with each picture would take a while
	} else {
		identity.record = recordOf(entry)
	}
	if before == nil {
		before = identity
	}
	identity.inherit(before)
	for _, name := range slices.Sorted(slices.Values(entry.GetFederatesWith())) {
		if td, err := spiffeid.TrustDomainFromString(name); err == nil && s.Foreign[td] != nil {
			identity.Federated = append(identity.Federated, s.Foreign[td])
			identity.FederatedJWT = append(identity.FederatedJWT, s.foreignJWT[td])
			if s.witPeers[name] {
				identity.FederatedWIT = append(identity.FederatedWIT, s.foreignWIT[td])
			}
		}
	}
	return identity, nil
}

// withSVIDs makes the state that follows when SVIDs were signed. One of an entry
// that is gone or another one meanwhile is dropped.
func (s *State) withSVIDs(signed map[string]*X509SVID) *State {
	next := *s
	next.reissued = nil
	next.Identities = slices.Clone(s.Identities)
	for i, identity := range s.Identities {
		svid := signed[identity.Entry.GetId()]
		if svid == nil || svid.ID != identity.ID || !svid.signedFor.is(identity.record) {
			continue
		}
		renewed := *identity
		renewed.SVID = svid
		renewed.demand()
		next.Identities[i] = &renewed
	}
	return &next
}

// under are the authority key ids of all SVIDs that the agent and its workloads have,
// sorted.
func (s *State) under() []string {
	set := map[string]struct{}{}
	if s.own != nil {
		set[ca.SignedUnder(s.own.Certificates[0])] = struct{}{}
	}
	for _, identity := range s.Identities {
		if identity.SVID != nil {
			set[identity.SVID.under] = struct{}{}
		}
		if identity.WIT != nil {
			set[ca.AuthorityKeyID(identity.WIT.keyID)] = struct{}{}
		}
	}
	return slices.Sorted(maps.Keys(set))
}

// tainted tells whether the agent's own SVID is to be issued anew, for what signed it is
// not trusted for much longer.
func (s *State) tainted(svid *x509svid.SVID) bool {
	return svid != nil && len(s.View.Tainted) > 0 && s.taintedKey(ca.SignedUnder(svid.Certificates[0]))
}

// taintedKey tells the same of what was signed under an authority key id or with a key id.
func (s *State) taintedKey(id string) bool {
	return id != "" && slices.ContainsFunc(s.View.Tainted, func(tainted string) bool {
		return ca.AuthorityKeyID(tainted) == ca.AuthorityKeyID(id)
	})
}

func bundlesDiffer(a, b map[string][]byte) bool {
	return !maps.EqualFunc(a, b, func(x, y []byte) bool { return string(x) == string(y) })
}

func parseBundle(td spiffeid.TrustDomain, jwks []byte) (*bundle.Bundle, error) {
	b, _, err := bundle.Parse(td, jwks)
	if err != nil {
		return nil, fmt.Errorf("the bundle of %s that the CA sent cannot be read: %w", td.Name(), err)
	}
	return b, nil
}

func readBundle(td spiffeid.TrustDomain, jwks []byte) (*x509bundle.Bundle, error) {
	b, err := parseBundle(td, jwks)
	if err != nil {
		return nil, err
	}
	return b.X509Bundle(), nil
}
