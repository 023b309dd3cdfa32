package domain

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/federation"
	"github.com/entente-mesh/entente/federation/catalog"
)

const (
	maxLabelText    = 1 << 10 // owner, source
	relationshipKey = "Relationship/"
)

// applyObjects changes the catalogue as a whole or not at all, and derives the
// entries that follow.
func (a *application) applyObjects(c *statev1.ApplyObjects) *Refusal {
	change, refusal := a.plan(c)
	if refusal != nil {
		return refusal
	}
	if len(change.objects) == 0 {
		return nil
	}
	a.State.tables = change.tables
	a.catalogue = a.rev
	for _, key := range slices.Sorted(maps.Keys(change.objects)) {
		a.awaitGiven(key, change.objects[key])
		if o := change.objects[key]; o != nil {
			put(a, &a.objects, key, o)
		} else {
			drop(a, &a.objects, key)
		}
		a.changed(ChangeObject, key)
	}
	for _, id := range slices.Sorted(maps.Keys(change.entries)) {
		a.setEntry(id, change.entries[id])
	}
	for _, td := range a.foreign.sorted() {
		if _, ok := a.objects.get(relationshipKey + td.GetTrustDomain()); !ok {
			a.setForeign(td.GetTrustDomain(), nil) // trust ended; so does what it rested on
		}
	}
	return nil
}

// catalogueChange is what an ApplyObjects comes down to: what really changes, nil
// for what goes.
type catalogueChange struct {
	objects map[string]*statev1.Object
	entries map[string]*statev1.Entry
	tables  *catalog.Tables
}

func (a *application) plan(c *statev1.ApplyObjects) (change catalogueChange, refusal *Refusal) {
	change = catalogueChange{objects: map[string]*statev1.Object{}, entries: map[string]*statev1.Entry{}}
	seen := map[string]bool{}
	for _, proposed := range c.GetUpserts() {
		key := ObjectKey(proposed)
		switch {
		case key == "":
			return change, refuse(CodeInvalid, "an object has no kind that this release knows")
		case seen[key]:
			return change, refuse(CodeInvalid, "%s stands there twice", key)
		case len(proposed.GetOwner()) > maxLabelText || len(proposed.GetSource()) > maxLabelText:
			return change, refuse(CodeInvalid, "%s: owner or source has over %d bytes", key, maxLabelText)
		}
		if r := proposed.GetRelationship(); r != nil {
			if td, err := ca.ParseTrustDomain(r.GetTrustDomain()); err != nil {
				return change, blame(proposed, err)
			} else if td == a.td {
				return change, blame(proposed, fmt.Errorf("a relationship is with another trust domain"))
			}
		}
		seen[key] = true
		o := proto.CloneOf(proposed)
		if have, ok := a.objects.get(key); ok {
			if o.Revision = have.GetRevision(); proto.Equal(o, have) {
				continue
			}
		}
		o.Revision = a.rev
		change.objects[key] = o
	}
	for _, d := range c.GetDeletes() {
		key := d.GetKind() + "/" + d.GetName()
		if seen[key] {
			return change, refuse(CodeInvalid, "%.300s stands there twice", key)
		}
		seen[key] = true
		if _, ok := a.objects.get(key); !ok {
			return change, refuse(CodeNotFound, "there is no %.300s", key)
		}
		change.objects[key] = nil
	}
	if len(change.objects) == 0 {
		return change, nil
	}
	tables, err := a.tables.Update(change.objects, func() []*statev1.Object { return a.after(change.objects) })
	if err != nil {
		return change, invalid(err)
	}
	change.tables = tables
	if refusal := a.derive(&change); refusal != nil {
		return change, refusal
	}
	items := 0
	for id, next := range change.entries {
		have, _ := a.entries.get(id)
		items += len(a.voided(have, next))
	}
	return change, cmp.Or(a.identitiesTaken(&change), a.roomForDistrust(items))
}

// identitiesTaken refuses a service whose identity an entry that is declared by itself
// has: the workload of that entry would be taken for the service. Only an identity that
// is new to its service is looked for, since that looks at every entry.
func (a *application) identitiesTaken(change *catalogueChange) *Refusal {
	paths := map[string]string{}
	for id, e := range change.entries {
		if e == nil {
			continue
		}
		if have, ok := a.entries.get(id); !ok || have.GetPath() != e.GetPath() {
			paths[e.GetPath()] = id
		}
	}
	if len(paths) == 0 {
		return nil
	}
	for raw := range a.entries.rawFrom(ca.DeclaredPrefix) {
		v, _ := viewEntry(raw, false)
		if !Declared(string(v.id)) {
			break // they stand together
		}
		if of, ok := paths[string(v.path)]; ok {
			return refuse(CodeExists, "entry %s gives the SPIFFE path %s of %s to another workload: delete it first", v.id, v.path, of)
		}
	}
	return nil
}

// after is the whole catalogue as it would be, by key.
func (a *application) after(changed map[string]*statev1.Object) []*statev1.Object {
	byKey := make(map[string]*statev1.Object, len(a.objects.rows)+len(changed))
	for i, o := range a.objects.rows {
		byKey[a.objects.keys[i]] = o
	}
	maps.Copy(byKey, changed)
	after := make([]*statev1.Object, 0, len(byKey))
	for _, key := range slices.Sorted(maps.Keys(byKey)) {
		if o := byKey[key]; o != nil {
			after = append(after, o)
		}
	}
	return after
}

// derive finds the entries that change with the objects. A gateway's follows from
// the relationships as well.
func (a *application) derive(change *catalogueChange) *Refusal {
	before := a.Peers()
	peers := slices.DeleteFunc(slices.Clone(before), func(td string) bool {
		_, changed := change.objects[relationshipKey+td]
		return changed
	})
	var concerned []*statev1.Object
	for _, o := range change.objects {
		if o == nil {
			continue
		}
		concerned = append(concerned, o)
		if r := o.GetRelationship(); r != nil {
			peers = append(peers, r.GetTrustDomain())
		}
	}
	slices.Sort(peers)
	if !slices.Equal(peers, before) {
		for _, o := range a.objects.rows {
			if _, changed := change.objects[ObjectKey(o)]; !changed && o.GetGateway() != nil {
				concerned = append(concerned, o)
			}
		}
	}
	slices.SortFunc(concerned, func(x, y *statev1.Object) int { return strings.Compare(ObjectKey(x), ObjectKey(y)) })
	for _, o := range concerned {
		entries, err := ca.EntriesFor(a.td, o, peers, a.lifetimes.Phase)
		if err != nil {
			return blame(o, err)
		}
		for _, e := range entries {
			if a.hardened() {
				if err := a.CheckAnchored(e); err != nil {
					return blame(o, err)
				}
			}
			if have, ok := a.entries.get(e.GetId()); ok {
				if e.Revision = have.GetRevision(); proto.Equal(e, have) {
					continue
				}
			}
			e.Revision = a.rev
			change.entries[e.GetId()] = e
		}
	}
	for key, o := range change.objects {
		if o != nil {
			continue
		}
		gone, _ := a.objects.get(key)
		if s := gone.GetService(); s != nil {
			change.entries[ca.ServiceEntry(s.GetName())] = nil
		} else if g := gone.GetGateway(); g != nil {
			change.entries[ca.GatewayEntry(g.GetName())] = nil
		}
	}
	return nil
}

// blame names the object, and where it was declared, in a refusal.
func blame(o *statev1.Object, err error) *Refusal {
	if source := o.GetSource(); source != "" {
		return refuse(CodeInvalid, "%s: %s: %v", source, ObjectKey(o), err)
	}
	return refuse(CodeInvalid, "%s: %v", ObjectKey(o), err)
}

// setEntry stores an entry, nil to remove it.
func (a *application) setEntry(id string, e *statev1.Entry) {
	have, _ := a.entries.get(id)
	a.replaceEntry(id, have, e)
}

func (a *application) replaceEntry(id string, have, e *statev1.Entry) {
	switch {
	case e != nil:
		a.entries.put(e, &a.sum)
	case have != nil:
		a.entries.remove(id, &a.sum)
	default:
		return
	}
	a.revision = a.rev
	hosts := slices.Concat(have.GetHosts(), e.GetHosts())
	slices.Sort(hosts)
	a.changes = append(a.changes, Change{Kind: ChangeEntry, Key: id, Hosts: slices.Compact(hosts)})
	a.share(have.GetPath(), -1)
	a.share(e.GetPath(), 1)
	for _, item := range a.voided(have, e) {
		if a.hardened() {
			item.Path = have.GetPath()
		}
		a.distrusted(item, a.longestLife())
	}
}

// storeForeignBundle keeps what was fetched, as the fetcher wrote it again. The sequence is
// judged, which never goes back (I8); what of the keys is used is found when it is read.
func (a *application) storeForeignBundle(c *statev1.StoreForeignBundle) *Refusal {
	td := c.GetTrustDomain()
	relationship, ok := a.objects.get(relationshipKey + td)
	switch {
	case !ok:
		return refuse(CodeNotFound, "there is no relationship with %.255s", td)
	case c.GetGiven() && c.GetRelationship() != relationship.GetRevision():
		return refuse(CodeConflict, "the relationship with %s gives another bundle by now", td)
	}
	if n := len(c.GetJwks()); n == 0 || n > maxBundle {
		return refuse(CodeInvalid, "bundle of %s has %d bytes, not 1 to %d", td, n, maxBundle)
	}
	next := &statev1.ForeignBundle{TrustDomain: td, Jwks: bytes.Clone(c.GetJwks()), Sequence: c.GetSequence(), Revision: a.rev}
	next.AsFetched, next.Given = a.hardened(), c.GetGiven()
	read := ReadForeign(next)
	if next.AsFetched {
		if read.err != nil || read.sequence != next.GetSequence() {
			return refuse(CodeInvalid, "bundle of %s is not written as this release writes bundles, or has another sequence than %d", td, next.GetSequence())
		}
	}
	have, _ := a.foreign.get(td)
	next.AwaitsGiven = have.GetAwaitsGiven() && !c.GetGiven()
	switch verdict := federation.AcceptBundle(have, next); verdict {
	case federation.Accepted:
	case federation.Unchanged:
		if have.GetAwaitsGiven() != next.GetAwaitsGiven() {
			same := proto.CloneOf(have)
			same.AwaitsGiven, same.Revision = next.GetAwaitsGiven(), a.rev
			a.setForeign(td, ReadForeign(same))
		}
		return nil
	case federation.Older:
		return refuse(CodeSequence, "bundle of %s has sequence %d, after %d: %v", td, c.GetSequence(), have.GetSequence(), verdict.Err())
	default:
		return refuse(CodeConflict, "bundle of %s with sequence %d: %v", td, c.GetSequence(), verdict.Err())
	}
	if next.GetSequence() < have.GetSequence() {
		if refusal := a.renewRelationship(td); refusal != nil {
			return refusal
		}
	}
	a.setForeign(td, read)
	return nil
}

// awaitGiven notes that a relationship is about to give another bundle by hand than before,
// which then counts until the next refresh (Federation 4.2). Who follows bundles stores it.
func (a *application) awaitGiven(key string, next *statev1.Object) {
	r := next.GetRelationship()
	if r == nil || !a.TakesGiven() {
		return
	}
	held, ok := a.foreign.get(r.GetTrustDomain())
	before, _ := a.objects.get(key)
	if !ok || bytes.Equal(before.GetRelationship().GetBootstrapBundle(), r.GetBootstrapBundle()) {
		return // without a bundle, what is given is the first one
	}
	marked := proto.CloneOf(held)
	marked.AwaitsGiven, marked.Revision = len(r.GetBootstrapBundle()) > 0, a.rev
	a.setForeign(r.GetTrustDomain(), ReadForeign(marked))
}

// resetForeignBundle lets the bundle with that hash follow the accepted one, whatever its
// sequence: one bundle, once, and only until another one is accepted.
func (a *application) resetForeignBundle(c *statev1.ResetForeignBundle) *Refusal {
	td := c.GetTrustDomain()
	held, ok := a.foreign.get(td)
	if !ok {
		return refuse(CodeNotFound, "no bundle of %.255s is held: there is no sequence to go back from", td)
	}
	if sum, err := hex.DecodeString(c.GetSha256()); err != nil || len(sum) != sha256.Size || hex.EncodeToString(sum) != c.GetSha256() {
		return refuse(CodeInvalid, "a bundle's hash is a SHA-256 in 64 lower-case hexadecimal digits, not %.80q", c.GetSha256())
	}
	if held.GetResetSha256() == c.GetSha256() {
		return nil
	}
	next := proto.CloneOf(held)
	next.ResetSha256, next.Revision = c.GetSha256(), a.rev
	a.setForeign(td, ReadForeign(next))
	return nil
}

// renewRelationship makes the relationship another one for those who follow its bundle: within
// one, a subscriber accepts no lower sequence (I8).
func (a *application) renewRelationship(td string) *Refusal {
	o, _ := a.objects.get(relationshipKey + td)
	renewed := proto.CloneOf(o)
	renewed.Revision = a.rev
	change := map[string]*statev1.Object{relationshipKey + td: renewed}
	tables, err := a.tables.Update(change, func() []*statev1.Object { return a.after(change) })
	if err != nil {
		return invalid(err)
	}
	a.State.tables, a.catalogue = tables, a.rev
	put(a, &a.objects, relationshipKey+td, renewed)
	a.changed(ChangeObject, relationshipKey+td)
	return nil
}

func compile(td spiffeid.TrustDomain, dev bool, objects []*statev1.Object) (*catalog.Tables, error) {
	return catalog.Compile(td, objects, catalog.AllowLoopback(dev))
}
