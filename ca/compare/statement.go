// Package compare decides whether what one CA node tells a subscriber is what the other
// nodes hold. Each node signs statements of its own state (Statement); a subscriber puts
// its own view and the statements that it hears into a Judge.
//
// Pure: no clock, no network. Values are not for concurrent use.
package compare

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
)

// Part is what of a state is compared.
type Part int

// The parts.
const (
	Members Part = iota
	Bundle
	Distrust
	parts
)

func (p Part) String() string {
	return [...]string{"CA nodes", "authorities", "distrust items"}[p]
}

// HashSize is of each part's hash.
const HashSize = 16

// Hash identifies the content of a part.
type Hash [HashSize]byte

// Content is the hash of each part.
type Content [parts]Hash

// maxSpans bounds what is remembered of each part.
const maxSpans = 8

// Span says that a part had one content at two revisions and between.
type Span struct {
	From, To uint64
	Hash     Hash
}

// History is what the parts held at the last revisions, ascending.
type History [parts][]Span

// Add says what the state holds at a revision. One lower than before begins anew.
func (h *History) Add(revision uint64, c Content) {
	for p := range h {
		spans := h[p]
		if n := len(spans); n > 0 {
			last := &spans[n-1]
			switch {
			case revision < last.To:
				spans = nil
			case last.Hash == c[p]:
				last.To = revision
				continue
			case revision == last.To && last.From == revision:
				spans = spans[:n-1]
			case revision == last.To:
				last.To--
			}
		}
		if len(spans) == maxSpans {
			spans = slices.Delete(spans, 0, 1)
		}
		h[p] = append(spans, Span{revision, revision, c[p]})
	}
}

// Revision is the newest one.
func (h *History) Revision() (revision uint64) {
	for _, spans := range h {
		if n := len(spans); n > 0 {
			revision = max(revision, spans[n-1].To)
		}
	}
	return revision
}

// compare looks at the newest revision of which both histories know a part.
func compare(a, b *History, p Part) (same, known bool) {
	for i := len(a[p]) - 1; i >= 0; i-- {
		for j := len(b[p]) - 1; j >= 0; j-- {
			if x, y := a[p][i], b[p][j]; max(x.From, y.From) <= min(x.To, y.To) {
				return x.Hash == y.Hash, true
			}
		}
	}
	return false, false
}

// MembersHash hashes a member table.
func MembersHash(members []*statev1.Member) Hash { return hashRecords(members) }

// DistrustHash hashes all distrust items.
func DistrustHash(items []*statev1.Distrust) Hash { return hashRecords(items) }

func hashRecords[T proto.Message](records []T) Hash {
	sums := make([]recordSum, len(records))
	for i, r := range records {
		sums[i] = sumOf(r)
	}
	return hashSums(sums)
}

// recordSum is what a record puts into the hash of its set.
type recordSum struct{ record, item [sha256.Size]byte }

func sumOf(r proto.Message) (s recordSum) {
	s.record = ca.RecordHash(r)
	s.item = sha256.Sum256(s.record[:])
	return s
}

// hashSums is hashSet of the records' hashes.
func hashSums(sums []recordSum) Hash {
	slices.SortFunc(sums, func(a, b recordSum) int { return bytes.Compare(a.record[:], b.record[:]) })
	h := sha256.New()
	for _, s := range slices.Compact(sums) {
		h.Write(s.item[:])
	}
	return Hash(h.Sum(nil)[:HashSize])
}

// DistrustSet hashes the distrust items of one state again and again: an item is hashed
// once. Items are immutable, and known by their address.
type DistrustSet struct {
	sums map[*statev1.Distrust]recordSum // of the last set; nil: there was none
	hash Hash
}

// Hash is DistrustHash of items none of which stands there twice.
func (d *DistrustSet) Hash(items []*statev1.Distrust) Hash {
	news := func(i *statev1.Distrust) bool { _, known := d.sums[i]; return !known }
	if d.sums != nil && len(items) == len(d.sums) && !slices.ContainsFunc(items, news) {
		return d.hash
	}
	sums, list := make(map[*statev1.Distrust]recordSum, len(items)), make([]recordSum, 0, len(items))
	for _, i := range items {
		sum, known := d.sums[i]
		if !known {
			sum = sumOf(i)
		}
		sums[i] = sum
		list = append(list, sum)
	}
	d.sums, d.hash = sums, hashSums(list)
	return d.hash
}

// BundleHash hashes the own domain's authorities: certificates, and the
// SubjectPublicKeyInfos of the keys that sign tokens, DER. Their order does not matter.
func BundleHash(x509, jwt, wit [][]byte) Hash {
	var all [][]byte
	for kind, list := range [][][]byte{x509, jwt, wit} {
		for _, der := range list {
			all = append(all, append([]byte{byte(kind)}, der...))
		}
	}
	return hashSet(all)
}

func hashSet(items [][]byte) Hash {
	slices.SortFunc(items, bytes.Compare)
	h := sha256.New()
	for _, item := range slices.CompactFunc(items, bytes.Equal) {
		sum := sha256.Sum256(item)
		h.Write(sum[:])
	}
	return Hash(h.Sum(nil)[:HashSize])
}

// Signed is a statement as it is sent.
type Signed = ententev1.SignedStatement

// Statement is what a CA node says of its own state.
type Statement struct {
	Member  string // its id
	Epoch   uint32
	Time    time.Time // by its clock
	Behind  bool      // it may lack what was agreed meanwhile
	History History
}

const (
	statementContext = "entente node statement v1\x00"
	maxStatement     = 4 << 10
	maxSigned        = maxStatement + 512 // with key and signature, as it is passed on
)

func statementSum(encoded []byte) [sha256.Size]byte {
	return sha256.Sum256(append([]byte(statementContext), encoded...))
}

// Sign has a statement signed with the node's key: sign returns the key, PKIX DER, and its
// signature in the form of ca.FixedSignature.
func (s *Statement) Sign(clusterID []byte, sign func([sha256.Size]byte) (key, signature []byte, err error)) (*ententev1.SignedStatement, error) {
	m := &ententev1.NodeStatement{ClusterId: clusterID, Epoch: s.Epoch, MemberId: s.Member, UnixNanos: s.Time.UnixNano(), Behind: s.Behind}
	for p, list := range []*[]*ententev1.StateSpan{&m.Members, &m.Bundle, &m.Distrust} {
		for _, span := range s.History[p] {
			*list = append(*list, &ententev1.StateSpan{From: span.From, To: span.To, Hash: span.Hash[:]})
		}
	}
	encoded, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("sign statement: %w", err)
	}
	key, signature, err := sign(statementSum(encoded))
	if err != nil {
		return nil, fmt.Errorf("sign statement: %w", err)
	}
	return &ententev1.SignedStatement{Statement: encoded, NodeKey: key, Signature: signature}, nil
}

// Read decodes a statement that is not verified yet, to see whose it is and when it was
// made.
func Read(signed *ententev1.SignedStatement) (*Statement, error) {
	s, _, err := read(signed)
	return s, err
}

func read(signed *ententev1.SignedStatement) (*Statement, *ententev1.NodeStatement, error) {
	if n := len(signed.GetStatement()); n == 0 || n > maxStatement {
		return nil, nil, fmt.Errorf("a statement has %d bytes, not 1 to %d", n, maxStatement)
	}
	if n := proto.Size(signed); n > maxSigned {
		return nil, nil, fmt.Errorf("a signed statement has %d bytes, over %d", n, maxSigned)
	}
	m := &ententev1.NodeStatement{}
	if err := proto.Unmarshal(signed.GetStatement(), m); err != nil {
		return nil, nil, fmt.Errorf("a statement does not decode: %w", err)
	}
	s := &Statement{Member: m.GetMemberId(), Epoch: m.GetEpoch(), Time: time.Unix(0, m.GetUnixNanos()), Behind: m.GetBehind()}
	for p, list := range [][]*ententev1.StateSpan{m.GetMembers(), m.GetBundle(), m.GetDistrust()} {
		if len(list) == 0 || len(list) > maxSpans {
			return nil, nil, fmt.Errorf("a statement has %d spans of %s, not 1 to %d", len(list), Part(p), maxSpans)
		}
		before := uint64(0)
		for i, span := range list {
			if len(span.GetHash()) != HashSize || span.GetTo() < span.GetFrom() || i > 0 && span.GetFrom() <= before {
				return nil, nil, fmt.Errorf("a statement's spans of %s are malformed", Part(p))
			}
			before = span.GetTo()
			s.History[p] = append(s.History[p], Span{span.GetFrom(), span.GetTo(), Hash(span.GetHash())})
		}
	}
	return s, m, nil
}

// Verify decodes a statement and verifies that the CA node whose id it names signed it,
// for this cluster.
func Verify(clusterID []byte, signed *ententev1.SignedStatement) (*Statement, error) {
	s, m, err := read(signed)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(m.GetClusterId(), clusterID) {
		return nil, errors.New("the statement is of another cluster")
	}
	id, err := ca.VerifyApproval(statementSum(signed.GetStatement()), signed.GetNodeKey(), signed.GetSignature())
	if err != nil {
		return nil, fmt.Errorf("the statement of CA node %.12s is not signed with its key: %w", s.Member, err)
	}
	if id != s.Member {
		return nil, fmt.Errorf("the statement of CA node %.12s is signed by %.12s", s.Member, id)
	}
	return s, nil
}
