package domain

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

// Which domain a key is accepted for (I2) follows from all bundles together and from no
// order: bundles are kept as they were fetched, and what of them is used is found again
// whenever one of them, or this domain's own keys, change. So nobody's bundle takes a key
// from another domain for longer than it is there.
//
//   - A key of this domain is nobody else's.
//   - A key that has signed which domain it belongs to (ca.BundleKey.Owner) is that
//     domain's; it is dropped from every other bundle, also if that domain is unknown here.
//   - A key in several bundles without such a proof is dropped from all of them: one of
//     them lies, or they share a root, and then each could sign names of the other.

// MaxForeignBundle is the largest bundle of another domain that is kept, in bytes.
const MaxForeignBundle = maxBundle

// Dropped is a key of another domain's bundle that is not used.
type Dropped struct {
	ID     string // of the key; empty: it cannot be read
	Use    statev1.KeyUse
	Other  string // the trust domain because of which; empty: none
	Reason string
}

func (d Dropped) String() string {
	if d.ID == "" {
		return d.Reason
	}
	return fmt.Sprintf("%s key %.12s: %s", ca.UseName(d.Use), d.ID, d.Reason)
}

// KeepsForeignWhole tells whether bundles of other domains are kept as fetched. Below that
// level only what is used of them is kept, as the release before did.
func (s *State) KeepsForeignWhole() bool { return s.hardened() }

// ProvesKeys tells whether a JWT or WIT authority comes with the proof of its key.
func (s *State) ProvesKeys() bool { return s.hardened() }

// foreignUse is derived from the records: what of the other domains' bundles is used.
type foreignUse struct {
	keys    map[string]*Foreign // by trust domain, of each bundle as fetched
	usable  map[string]*statev1.ForeignBundle
	dropped map[string][]Dropped
}

// Foreign is a bundle of another domain with its keys read.
type Foreign struct {
	of       *statev1.ForeignBundle
	list     []*ca.BundleKey
	sequence uint64
	err      error
}

// ReadForeign reads the keys of a bundle. It needs no lock.
func ReadForeign(b *statev1.ForeignBundle) *Foreign {
	k := &Foreign{of: b}
	k.list, k.sequence, k.err = ca.BundleKeys(b.GetJwks())
	return k
}

// FetchedBundle is the last accepted bundle of a peer as it was fetched, with keys that
// are not used.
func (s *State) FetchedBundle(trustDomain string) (*statev1.ForeignBundle, bool) {
	return s.foreign.get(trustDomain)
}

// DroppedKeys are the keys of a peer's bundle that are not used.
func (s *State) DroppedKeys(trustDomain string) []Dropped { return s.use.dropped[trustDomain] }

// UsableWith finds what would be used of these bundles, by trust domain, if they were
// accepted in place of the agreed ones.
func (s *State) UsableWith(ahead map[string]*Foreign) map[string]*statev1.ForeignBundle {
	keys := maps.Clone(s.use.keys)
	if keys == nil {
		keys = map[string]*Foreign{}
	}
	maps.Copy(keys, ahead)
	usable, _ := s.judge(keys)
	maps.DeleteFunc(usable, func(td string, _ *statev1.ForeignBundle) bool { return ahead[td] == nil })
	return usable
}

// ForeignOwner is the domain in whose bundle a key stands, and whether the key has signed
// that it belongs there; empty if it stands in none.
func (s *State) ForeignOwner(id string) (trustDomain string, proven bool) {
	if id == "" {
		return "", false
	}
	for _, b := range s.foreign.sorted() {
		td := b.GetTrustDomain()
		for _, k := range s.use.keys[td].list {
			if k.ID != id {
				continue
			}
			if trustDomain = td; k.Owner() == td {
				return td, true
			}
		}
	}
	return trustDomain, false
}

// OwnKey tells whether this domain has a key: it signs for it, did not long ago, or is the
// root of what does.
func (s *State) OwnKey(id string) bool { return s.ownKeys()[id] }

// judge says what is used of bundles with these keys.
func (s *State) judge(keys map[string]*Foreign) (usable map[string]*statev1.ForeignBundle, dropped map[string][]Dropped) {
	usable, dropped = map[string]*statev1.ForeignBundle{}, map[string][]Dropped{}
	own := s.ownKeys()
	in := map[string][]string{} // key id -> trust domains, sorted
	for _, td := range slices.Sorted(maps.Keys(keys)) {
		for _, k := range keys[td].list {
			if list := in[k.ID]; k.ID != "" && (len(list) == 0 || list[len(list)-1] != td) {
				in[k.ID] = append(list, td)
			}
		}
	}
	// owns: some entry of td's bundle for that key proves that it is td's.
	owns := func(td, id string) bool {
		return slices.ContainsFunc(keys[td].list, func(k *ca.BundleKey) bool { return k.ID == id && k.Owner() == td })
	}
	for td, held := range keys {
		if held.err != nil {
			none := proto.CloneOf(held.of)
			none.Jwks = ca.WithoutKeys([]byte(`{"keys":[]}`), nil, nil)
			usable[td] = none
			dropped[td] = []Dropped{{Reason: held.err.Error()}}
			continue
		}
		relationship, _ := s.objects.get(relationshipKey + td)
		out := make([]bool, len(held.list))
		for i, k := range held.list {
			if k.Use == statev1.KeyUse_KEY_USE_WIT && !relationship.GetRelationship().GetWit() {
				out[i] = true // not asked for
				continue
			}
			if d, drop := whyDropped(td, k, own, in[k.ID], owns); drop {
				out[i] = true
				if d.Other == "" && k.Broken == nil {
					d.Other = s.td.Name()
				}
				d.ID, d.Use = k.ID, k.Use
				dropped[td] = append(dropped[td], d)
			}
		}
		usable[td] = held.of
		if slices.Contains(out, true) {
			b := proto.CloneOf(held.of)
			b.Jwks = ca.WithoutKeys(held.of.GetJwks(), held.list, func(i int) bool { return out[i] })
			usable[td] = b
		}
	}
	return usable, dropped
}

func whyDropped(td string, k *ca.BundleKey, own map[string]bool, in []string, owns func(td, id string) bool) (d Dropped, drop bool) {
	switch {
	case k.Broken != nil:
		return Dropped{Reason: k.Broken.Error()}, true
	case own[k.ID]:
		return Dropped{Reason: "the key is this domain's own"}, true
	}
	// Who does not name another domain and is alone with the key needs no proof.
	if owner := k.Names; owner != "" && owner != td && k.Owner() == owner {
		return Dropped{Other: owner, Reason: fmt.Sprintf("the key has signed that it belongs to %s", owner)}, true
	}
	mine := owns(td, k.ID)
	for _, other := range in {
		switch {
		case other == td:
		case owns(other, k.ID) && mine:
			return Dropped{Other: other, Reason: fmt.Sprintf("the key has signed that it belongs to %s as well", other)}, true
		case owns(other, k.ID):
			return Dropped{Other: other, Reason: fmt.Sprintf("the key has signed that it belongs to %s", other)}, true
		case !mine:
			return Dropped{Other: other, Reason: fmt.Sprintf("the bundle of %s has the key too, and it has not signed to which of them it belongs", other)}, true
		}
	}
	return Dropped{}, false
}

// ownKeys are the ids of all keys that sign for this domain, or did not long ago.
func (s *State) ownKeys() map[string]bool {
	own := make(map[string]bool, len(s.authorities.rows))
	for _, a := range s.authorities.rows {
		own[a.GetId()] = true
		if len(a.GetUpstream()) > 0 {
			own[ca.CertificateKeyID(a.GetUpstream())] = true
		}
	}
	return own
}

// settleForeign follows a change of what the use of foreign bundles depends on, and names
// the bundles that subscribers hold differently now.
func (a *application) settleForeign() {
	if !a.hardened() || a.use.usable != nil && !slices.ContainsFunc(a.changes, func(c Change) bool {
		return c.Kind == ChangeForeignBundle || c.Kind == ChangeAuthority || c.Kind == ChangeObject && strings.HasPrefix(c.Key, relationshipKey)
	}) {
		return
	}
	before := a.use.usable
	a.use.usable, a.use.dropped = a.judge(a.use.keys)
	for _, b := range a.foreign.sorted() {
		td := b.GetTrustDomain()
		was, now := before[td], a.use.usable[td]
		if before == nil {
			was = b // used as it stands
		}
		if was != nil && bytes.Equal(was.GetJwks(), now.GetJwks()) ||
			slices.ContainsFunc(a.changes, func(c Change) bool { return c.Kind == ChangeForeignBundle && c.Key == td }) {
			continue
		}
		a.changed(ChangeForeignBundle, td)
	}
}

// setForeign stores a bundle, nil to remove it.
func (a *application) setForeign(td string, b *Foreign) {
	if b == nil {
		drop(a, &a.foreign, td)
		delete(a.use.keys, td)
	} else {
		put(a, &a.foreign, td, b.of)
		if a.use.keys == nil {
			a.use.keys = map[string]*Foreign{}
		}
		a.use.keys[td] = b
	}
	a.changed(ChangeForeignBundle, td)
}
