package ca

import (
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// DistrustGrace is kept beyond the end of what a distrust item names, for clocks that
// disagree.
const DistrustGrace = 5 * time.Minute

// DistrustID is the key of a distrust item: what it names, without generations. A
// later item of the same id takes the place of the earlier one, for generations grow.
func DistrustID(d *statev1.Distrust) string {
	var parts []string
	for _, part := range []struct{ kind, name string }{{"authority", d.GetAuthority()}, {"agent", d.GetAgent()}, {"entry", d.GetEntry()}} {
		if part.name != "" {
			parts = append(parts, part.kind+"/"+part.name)
		}
	}
	return strings.Join(parts, " ") // names hold no blank
}

// AuthorityKeyID is how an SVID names the authority with that id: its authority key
// id, in hex (a hash of the same key, cut as RFC 7093 section 2 method 4 says).
func AuthorityKeyID(authority string) string { return authority[:min(len(authority), 40)] }

// SignedUnder is the authority key id of an SVID, as AuthorityKeyID gives it; empty if
// it has none.
func SignedUnder(leaf *x509.Certificate) string { return hex.EncodeToString(leaf.AuthorityKeyId) }

// Distrusted answers whether an SVID must not be accepted although it is valid. It is
// immutable; nil distrusts nothing.
type Distrusted struct {
	domain      string
	authorities map[string]struct{} // ids
	issued      map[issued]generations
	pairs       bool // some item names both an agent and an entry
}

type issued struct{ agent, entry string } // one of the two may be empty: any

type generations struct{ agent, entry uint64 }

// NewDistrusted takes the items of a trust domain's state. They speak of SVIDs of that
// domain only: another one may have agents and entries of the same names. An item that
// names nothing is passed over: it would name everything.
func NewDistrusted(td spiffeid.TrustDomain, items []*statev1.Distrust) *Distrusted {
	if len(items) == 0 {
		return nil
	}
	d := &Distrusted{domain: td.Name(), authorities: map[string]struct{}{}, issued: map[issued]generations{}}
	for _, item := range items {
		switch {
		case item.GetAgent() != "" || item.GetEntry() != "":
			key := issued{item.GetAgent(), item.GetEntry()}
			// Of two items that name the same, one cannot take back what the other denies.
			before := d.issued[key]
			d.issued[key] = generations{max(before.agent, item.GetAgentGeneration()), max(before.entry, item.GetEntryGeneration())}
			d.pairs = d.pairs || key.agent != "" && key.entry != ""
		case item.GetAuthority() != "":
			d.authorities[item.GetAuthority()] = struct{}{}
		}
	}
	return d
}

// Check says why the SVID with that verified path, leaf first and authority last, is
// distrusted; nil if it is not. An SVID without an origin can only be named by its
// authority. An origin that cannot be read could be any.
func (d *Distrusted) Check(path []*x509.Certificate) error {
	if d == nil || len(path) == 0 || len(path[0].URIs) != 1 || path[0].URIs[0].Host != d.domain {
		return nil
	}
	if len(d.authorities) > 0 {
		for _, signer := range path[1:] {
			id := KeyID(signer.RawSubjectPublicKeyInfo)
			if _, revoked := d.authorities[id]; revoked {
				return fmt.Errorf("authority %.12s was revoked", id)
			}
		}
	}
	if len(d.issued) == 0 {
		return nil
	}
	o, ok, err := OriginOf(path[0])
	if err != nil {
		return err
	}
	if !ok {
		return nil
	}
	return d.CheckOrigin(o)
}

// CheckToken is Check for a JWT-SVID or WIT-SVID that verified under the authority with
// that key id, with its claims as encoding/json reads them.
func (d *Distrusted) CheckToken(id spiffeid.ID, keyID string, claims map[string]any) error {
	if d == nil || id.TrustDomain().Name() != d.domain {
		return nil
	}
	if _, revoked := d.authorities[keyID]; revoked {
		return fmt.Errorf("authority %.12s was revoked", keyID)
	}
	if len(d.issued) == 0 {
		return nil
	}
	o, ok, err := OriginOfClaims(claims)
	if err != nil {
		return err // signed by an authority of ours, and yet nothing that we write
	}
	if !ok {
		return nil
	}
	return d.CheckOrigin(o)
}

// CheckHeld is Check for an SVID of the own domain of which its holder remembers the
// authority's key id (SignedUnder) and the origin.
func (d *Distrusted) CheckHeld(under string, o Origin) error {
	if d == nil {
		return nil
	}
	for id := range d.authorities {
		if AuthorityKeyID(id) == under {
			return fmt.Errorf("authority %.12s was revoked", id)
		}
	}
	return d.CheckOrigin(o)
}

// CheckOrigin says why what the own domain issued with that origin is distrusted; nil if
// it is not.
func (d *Distrusted) CheckOrigin(o Origin) error {
	if d == nil {
		return nil
	}
	if g, ok := d.issued[issued{agent: o.Agent}]; ok && o.Agent != "" && o.AgentGeneration <= g.agent {
		return fmt.Errorf("agent %s, through which it was issued, was banned or evicted", o.Agent)
	}
	if o.Entry == "" {
		return nil
	}
	if g, ok := d.issued[issued{entry: o.Entry}]; ok && o.EntryGeneration <= g.entry {
		return fmt.Errorf("entry %s, for which it was issued, was deleted, or changed so that its holder may no longer match", o.Entry)
	}
	if d.pairs {
		if g, ok := d.issued[issued{o.Agent, o.Entry}]; ok && o.EntryGeneration <= g.entry {
			return fmt.Errorf("entry %s is no longer for agent %s", o.Entry, o.Agent)
		}
	}
	return nil
}
