package wire

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/federation/catalog"
)

// Update is what the policy lane says at once: a full state, or what is different since the
// update before. Records are shared: not to be changed.
type Update struct {
	Full     bool   // forget what was there
	Revision uint64 // the subscriber holds all up to here once it has applied this

	Cluster        *statev1.Cluster // nil: as before
	Entries        []*statev1.Entry
	DeletedEntries []string
	Bundles        []*statev1.ForeignBundle // of other domains, and the own one as it is handed out
	DeletedBundles []string                 // trust domains
	Objects        []*statev1.Object
	DeletedObjects []string // Kind/name
	Members        []*statev1.Member
	MembersChanged bool

	Distrust        []*statev1.Distrust
	DeletedDistrust []string // ids
	Tainted         []string // authority ids: all, if TaintedChanged
	TaintedChanged  bool
	Reissue         time.Duration // over which renewals because of Tainted are to be spread

	TooOld        []string // what restricts and the subscriber cannot enforce: all, if TooOldChanged
	TooOldChanged bool
}

// Empty tells whether the update only moves the revision.
func (u *Update) Empty() bool {
	return !u.Full && u.Cluster == nil && !u.MembersChanged && !u.TaintedChanged && !u.TooOldChanged &&
		len(u.Entries)+len(u.DeletedEntries)+len(u.Bundles)+len(u.DeletedBundles)+
			len(u.Objects)+len(u.DeletedObjects)+len(u.Distrust)+len(u.DeletedDistrust) == 0
}

// Encode cuts an update into chunks of at most size bytes, unless one record alone is
// larger. The first says whether it is full, the last carries the revision.
func (u *Update) Encode(size int) []*ententev1.Policy {
	chunk := &ententev1.Policy{Full: u.Full, Cluster: u.Cluster, MembersChanged: u.MembersChanged, Members: u.Members}
	chunks := []*ententev1.Policy{chunk}
	used := proto.Size(chunk)
	room := func(n int) *ententev1.Policy {
		if used += n + 8; used > size {
			chunk = &ententev1.Policy{}
			chunks = append(chunks, chunk)
			used = n
		}
		return chunk
	}
	// Bundles before entries: who gets a new identity can verify its peers.
	for _, b := range u.Bundles {
		c := room(len(b.GetJwks()))
		c.Bundles = append(c.Bundles, FromBundle(b))
	}
	for _, td := range u.DeletedBundles {
		c := room(len(td))
		c.DeletedBundles = append(c.DeletedBundles, td)
	}
	for _, o := range u.Objects {
		c := room(proto.Size(o))
		c.Objects = append(c.Objects, o)
	}
	for _, key := range u.DeletedObjects {
		c := room(len(key))
		c.DeletedObjects = append(c.DeletedObjects, FromKey(key))
	}
	for _, e := range u.Entries {
		c := room(proto.Size(e))
		c.Entries = append(c.Entries, e)
	}
	for _, id := range u.DeletedEntries {
		c := room(len(id))
		c.DeletedEntries = append(c.DeletedEntries, id)
	}
	for _, d := range u.Distrust {
		c := room(proto.Size(d))
		c.Distrust = append(c.Distrust, d)
	}
	for _, id := range u.DeletedDistrust {
		c := room(len(id))
		c.DeletedDistrust = append(c.DeletedDistrust, id)
	}
	if u.TaintedChanged {
		chunk.TaintedChanged, chunk.Tainted, chunk.ReissueWithinMs = true, u.Tainted, Milliseconds(u.Reissue)
	}
	if u.TooOldChanged {
		chunk.TooOldChanged, chunk.TooOld = true, u.TooOld
	}
	chunk.Last, chunk.Revision = true, u.Revision
	return chunks
}

// FromKey is what the key of an object, Kind/name, says on the wire.
func FromKey(key string) *statev1.ObjectKey {
	kind, name, _ := strings.Cut(key, "/")
	return &statev1.ObjectKey{Kind: kind, Name: name}
}

// FromBundle is what a bundle says on the wire.
func FromBundle(b *statev1.ForeignBundle) *ententev1.Bundle {
	return &ententev1.Bundle{TrustDomain: b.GetTrustDomain(), Jwks: b.GetJwks(), Sequence: b.GetSequence()}
}

// ToBundle is the inverse of FromBundle.
func ToBundle(b *ententev1.Bundle) *statev1.ForeignBundle {
	return &statev1.ForeignBundle{TrustDomain: b.GetTrustDomain(), Jwks: b.GetJwks(), Sequence: b.GetSequence()}
}

// Milliseconds is how the wire says a time.
func Milliseconds(d time.Duration) uint32 { return uint32(d / time.Millisecond) }

// MaxPending bounds what is kept of an update before its last chunk, in bytes.
const MaxPending = 1 << 30

// ErrTooLarge: an update does not end.
var ErrTooLarge = errors.New("an update without an end")

// Pending collects the chunks of an update: the inverse of Encode. The zero value is an
// update of which nothing has come.
type Pending struct {
	Update
	size int
}

// Add takes the next chunk. Of a record that comes twice the later one counts, and one that
// is deleted, too, is deleted. An object of a kind that this release does not know is
// passed over.
func (p *Pending) Add(chunk *ententev1.Policy) error {
	if p.size += proto.Size(chunk); p.size > MaxPending {
		return fmt.Errorf("%w: more than %d bytes without a last chunk", ErrTooLarge, MaxPending)
	}
	p.Full = p.Full || chunk.GetFull()
	if chunk.GetCluster() != nil {
		p.Cluster = chunk.GetCluster()
	}
	for _, b := range chunk.GetBundles() {
		if _, err := spiffeid.TrustDomainFromString(b.GetTrustDomain()); err != nil || len(b.GetJwks()) == 0 {
			return fmt.Errorf("a bundle without a trust domain or without content (%q)", b.GetTrustDomain())
		}
		p.Bundles = append(p.Bundles, ToBundle(b))
	}
	p.DeletedBundles = append(p.DeletedBundles, chunk.GetDeletedBundles()...)
	for _, o := range chunk.GetObjects() {
		if o.GetKind() != nil {
			p.Objects = append(p.Objects, o)
		}
	}
	for _, k := range chunk.GetDeletedObjects() {
		p.DeletedObjects = append(p.DeletedObjects, k.GetKind()+"/"+k.GetName())
	}
	p.Entries = append(p.Entries, chunk.GetEntries()...)
	p.DeletedEntries = append(p.DeletedEntries, chunk.GetDeletedEntries()...)
	p.Distrust = append(p.Distrust, chunk.GetDistrust()...)
	p.DeletedDistrust = append(p.DeletedDistrust, chunk.GetDeletedDistrust()...)
	if chunk.GetMembersChanged() {
		p.Members, p.MembersChanged = append(p.Members, chunk.GetMembers()...), true
	}
	if chunk.GetTaintedChanged() {
		p.Tainted, p.TaintedChanged = chunk.GetTainted(), true
		p.Reissue = time.Duration(chunk.GetReissueWithinMs()) * time.Millisecond
	}
	if chunk.GetTooOldChanged() {
		p.TooOld, p.TooOldChanged = chunk.GetTooOld(), true
	}
	if chunk.GetLast() {
		p.Revision = chunk.GetRevision()
	}
	return nil
}

// State is what updates come to: the first a full one, then each folded into it. It is
// immutable, and shares with the one before what has not changed.
type State struct {
	Cluster  *statev1.Cluster
	Members  []*statev1.Member                 // by id
	Entries  []*statev1.Entry                  // by id
	Objects  []*statev1.Object                 // by key
	Bundles  map[string]*statev1.ForeignBundle // by trust domain
	Distrust map[string]*statev1.Distrust      // by id
	Tainted  []string
	Reissue  time.Duration
	TooOld   []string
}

// With is the state after an update.
func (s State) With(u *Update) State {
	if u.Full {
		s = State{Cluster: s.Cluster, Members: s.Members} // a full state has both, unless a CA node lies
	}
	if u.Cluster != nil {
		s.Cluster = u.Cluster
	}
	if u.MembersChanged {
		s.Members = merged(nil, u.Members, nil, (*statev1.Member).GetId)
	}
	s.Entries = merged(s.Entries, u.Entries, u.DeletedEntries, (*statev1.Entry).GetId)
	s.Objects = merged(s.Objects, u.Objects, u.DeletedObjects, catalog.Key)
	s.Bundles = mergedByKey(s.Bundles, u.Bundles, u.DeletedBundles, (*statev1.ForeignBundle).GetTrustDomain)
	s.Distrust = mergedByKey(s.Distrust, u.Distrust, u.DeletedDistrust, (*statev1.Distrust).GetId)
	if u.TaintedChanged {
		s.Tainted, s.Reissue = u.Tainted, u.Reissue
	}
	if u.TooOldChanged {
		s.TooOld = u.TooOld
	}
	return s
}

// Everything is the full update that leads to the state.
func (s State) Everything(revision uint64) *Update {
	u := &Update{
		Full: true, Revision: revision,
		Cluster: s.Cluster, Entries: s.Entries, Objects: s.Objects, Members: s.Members, MembersChanged: len(s.Members) > 0,
		Tainted: s.Tainted, TaintedChanged: true, Reissue: s.Reissue, TooOld: s.TooOld, TooOldChanged: len(s.TooOld) > 0,
	}
	for _, td := range slices.Sorted(maps.Keys(s.Bundles)) {
		u.Bundles = append(u.Bundles, s.Bundles[td])
	}
	for _, id := range slices.Sorted(maps.Keys(s.Distrust)) {
		u.Distrust = append(u.Distrust, s.Distrust[id])
	}
	return u
}

// merged lays changes over a sorted list. Without a change it is the list itself.
func merged[T any](list, set []*T, deleted []string, key func(*T) string) []*T {
	if len(set)+len(deleted) == 0 {
		return list
	}
	all := make(map[string]*T, len(list)+len(set))
	lay(all, list, nil, key)
	lay(all, set, deleted, key)
	return slices.SortedFunc(maps.Values(all), func(a, b *T) int { return cmp.Compare(key(a), key(b)) })
}

// mergedByKey is merged of what is kept by key.
func mergedByKey[T any](known map[string]*T, set []*T, deleted []string, key func(*T) string) map[string]*T {
	if len(set)+len(deleted) == 0 {
		return known
	}
	all := make(map[string]*T, len(known)+len(set))
	maps.Copy(all, known)
	lay(all, set, deleted, key)
	return all
}

func lay[T any](over map[string]*T, set []*T, deleted []string, key func(*T) string) {
	for _, record := range set {
		over[key(record)] = record
	}
	for _, k := range deleted {
		delete(over, k)
	}
}
