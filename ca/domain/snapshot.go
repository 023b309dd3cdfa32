package domain

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

// A snapshot is a stream:
//
//	magic, format version
//	chunks: length (4 bytes, 1..chunkSize), CRC-32C (4 bytes), that many bytes
//	an end: length 0, SHA-256 of all chunks' bytes
//
// The chunks' bytes together are records: kind (1 byte), length (varint), body. The
// first is the numbers of the state; then one for each record, a protobuf message, or of
// an entry the encoding that the checksum is made of, by id; the last is the trailer with the count of each kind and the checksum of the state.
const (
	snapshotMagic   = "entente snapshot\n"
	snapshotVersion = 3
	chunkSize       = 64 << 10
	maxRecord       = 1 << 20
	maxRecords      = 1 << 25
)

// Kinds of records. One from ignorable up may be skipped by who does not know it.
const (
	recordScalars byte = 1 + iota
	recordCluster
	recordMember
	recordAuthority
	recordToken
	recordAgent
	recordEntry
	recordObject
	recordForeign
	recordTrailer
	recordDistrust
	recordStaged
	recordPending
	recordEnd // no kind: one above the last

	recordIgnorable byte = 0x80
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Snapshot is the state at one index. It stays as it is while the state goes on, and
// may be written by another goroutine.
type Snapshot struct {
	scalars
	checksum [sha256.Size]byte

	cluster     []*statev1.Cluster
	members     []*statev1.Member
	authorities []*statev1.Authority
	tokens      []*statev1.Token
	agents      []*statev1.Agent
	entries     entryPlaces
	objects     []*statev1.Object
	foreign     []*statev1.ForeignBundle
	distrust    []*statev1.Distrust
	staged      []*statev1.Staged
	pending     []*statev1.PendingChange
}

// Snapshot captures the state. It copies one number for each entry, one pointer for each
// other record.
func (s *State) Snapshot() *Snapshot {
	return &Snapshot{
		scalars:     s.scalars,
		checksum:    s.checksum(),
		cluster:     slices.Clone(s.cluster.rows),
		members:     slices.Clone(s.members.rows),
		authorities: slices.Clone(s.authorities.rows),
		tokens:      slices.Clone(s.tokens.rows),
		agents:      slices.Clone(s.agents.rows),
		entries:     s.entries.places(),
		objects:     slices.Clone(s.objects.rows),
		foreign:     slices.Clone(s.foreign.rows),
		distrust:    slices.Clone(s.distrust.rows),
		staged:      slices.Clone(s.staged.rows),
		pending:     slices.Clone(s.pending.rows),
	}
}

// Applied is the log index of the last command in the snapshot.
func (n *Snapshot) Applied() uint64 { return n.applied }

// WriteTo streams the snapshot. Its memory does not grow with the state.
func (n *Snapshot) WriteTo(w io.Writer) (int64, error) {
	sw := newSnapshotWriter(w)
	sw.body(recordScalars, n.scalars.encode())
	writeAll(sw, recordCluster, n.cluster)
	writeAll(sw, recordMember, n.members)
	writeAll(sw, recordAuthority, n.authorities)
	writeAll(sw, recordToken, n.tokens)
	writeAll(sw, recordAgent, n.agents)
	for _, place := range n.entries.places {
		sw.body(recordEntry, rawEntry(n.entries.slabs, place))
	}
	writeAll(sw, recordObject, n.objects)
	writeAll(sw, recordForeign, n.foreign)
	writeAll(sw, recordDistrust, n.distrust)
	writeAll(sw, recordStaged, n.staged)
	writeAll(sw, recordPending, n.pending)
	sw.close(n.checksum)
	if sw.err != nil {
		return sw.written, fmt.Errorf("write snapshot of index %d: %w", n.applied, sw.err)
	}
	return sw.written, nil
}

// SnapshotHead is how many bytes of a snapshot SnapshotTime needs at most.
const SnapshotHead = 128

// SnapshotTime reads the agreed time from the beginning of a snapshot, before the rest
// is read and verified; false if it does not begin like one, or has no time yet.
func SnapshotTime(head []byte) (time.Time, bool) {
	rest, ok := bytes.CutPrefix(head, append([]byte(snapshotMagic), snapshotVersion))
	if !ok || len(rest) < chunkHeader+2 || rest[chunkHeader] != recordScalars {
		return time.Time{}, false
	}
	rest = rest[chunkHeader+1:]
	length, n := binary.Uvarint(rest)
	var numbers scalars
	if n <= 0 || length > uint64(len(rest)-n) || numbers.decode(rest[n:n+int(length)]) != nil || numbers.now == 0 {
		return time.Time{}, false
	}
	return time.Unix(0, numbers.now), true
}

func (n scalars) encode() []byte {
	var b []byte
	for _, v := range []uint64{n.applied, n.revision, n.bundle, n.catalogue, uint64(n.now)} {
		b = binary.AppendUvarint(b, v)
	}
	return b
}

func (n *scalars) decode(b []byte) error {
	var now uint64
	for _, into := range []*uint64{&n.applied, &n.revision, &n.bundle, &n.catalogue, &now} {
		v, size := binary.Uvarint(b)
		if size <= 0 {
			return errors.New("its numbers are malformed")
		}
		*into, b = v, b[size:]
	}
	n.now = int64(now)
	if len(b) != 0 {
		return errors.New("its numbers have trailing bytes")
	}
	return nil
}

// snapshotWriter keeps the first error and then does nothing.
type snapshotWriter struct {
	w       io.Writer
	sum     hash.Hash
	chunk   []byte // header, then body
	scratch []byte
	counts  [256]uint64
	written int64
	err     error
}

const chunkHeader = 8

func newSnapshotWriter(w io.Writer) *snapshotWriter {
	sw := &snapshotWriter{w: w, sum: sha256.New(), chunk: make([]byte, chunkHeader, chunkHeader+chunkSize)}
	sw.raw(append([]byte(snapshotMagic), snapshotVersion))
	return sw
}

func (sw *snapshotWriter) raw(b []byte) {
	if sw.err == nil {
		n, err := sw.w.Write(b)
		sw.written += int64(n)
		sw.err = err
	}
}

// Write fills chunks.
func (sw *snapshotWriter) Write(b []byte) (int, error) {
	for rest := b; len(rest) > 0; {
		n := min(len(rest), cap(sw.chunk)-len(sw.chunk))
		sw.chunk = append(sw.chunk, rest[:n]...)
		rest = rest[n:]
		if len(sw.chunk) == cap(sw.chunk) {
			sw.flush()
		}
	}
	return len(b), sw.err
}

func (sw *snapshotWriter) flush() {
	body := sw.chunk[chunkHeader:]
	if len(body) == 0 {
		return
	}
	binary.BigEndian.PutUint32(sw.chunk, uint32(len(body)))
	binary.BigEndian.PutUint32(sw.chunk[4:], crc32.Checksum(body, castagnoli))
	sw.sum.Write(body)
	sw.raw(sw.chunk)
	sw.chunk = sw.chunk[:chunkHeader]
}

func (sw *snapshotWriter) body(kind byte, body []byte) {
	if len(body) > maxRecord && sw.err == nil {
		sw.err = fmt.Errorf("a record has %d bytes, over %d", len(body), maxRecord)
	}
	sw.counts[kind]++
	head := binary.AppendUvarint([]byte{kind}, uint64(len(body)))
	sw.Write(head)
	sw.Write(body)
}

func writeAll[R proto.Message](sw *snapshotWriter, kind byte, rows []R) {
	for _, r := range rows {
		if sw.err != nil {
			return
		}
		body, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend(sw.scratch[:0], r)
		if err != nil {
			sw.err = err
			return
		}
		sw.scratch = body
		sw.body(kind, body)
	}
}

func (sw *snapshotWriter) close(checksum [sha256.Size]byte) {
	trailer := append([]byte{ChecksumFormat}, checksum[:]...)
	for kind := recordScalars; kind < recordEnd; kind++ {
		if kind == recordTrailer {
			continue
		}
		trailer = binary.AppendUvarint(trailer, sw.counts[kind])
	}
	sw.body(recordTrailer, trailer)
	sw.flush()
	sw.raw(sw.sum.Sum(make([]byte, 4)))
}

// Restore reads a snapshot into a new state, equal to the one it was taken of. It
// refuses what is cut short, altered, too large, of a format it does not know, or
// contradicts itself; r must end where the snapshot ends.
func Restore(r io.Reader) (*State, error) {
	s, err := restore(r)
	if err != nil {
		return nil, fmt.Errorf("restore snapshot: %w", err)
	}
	return s, nil
}

func restore(r io.Reader) (*State, error) {
	head := make([]byte, len(snapshotMagic)+1)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, cutShort(err)
	}
	if string(head[:len(snapshotMagic)]) != snapshotMagic {
		return nil, errors.New("this is not a snapshot")
	}
	if version := head[len(snapshotMagic)]; version != snapshotVersion {
		return nil, fmt.Errorf("its format %d is not known to this release, which reads format %d", version, snapshotVersion)
	}
	chunks := &chunkReader{r: r, sum: sha256.New()}
	loader := loader{s: New()}
	for {
		kind, body, err := chunks.record()
		if err != nil {
			return nil, err
		}
		if kind == recordTrailer {
			if err := loader.finish(body); err != nil {
				return nil, err
			}
			break
		}
		if err := loader.load(kind, body); err != nil {
			return nil, err
		}
	}
	if err := chunks.end(); err != nil {
		return nil, err
	}
	return loader.s, nil
}

func cutShort(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("it is cut short")
	}
	return err
}

// chunkReader gives out the chunks' bytes, each chunk only when its CRC is right.
type chunkReader struct {
	r     io.Reader
	sum   hash.Hash
	buf   []byte // of the last chunk
	rest  []byte // of buf, not given out yet
	ended bool
	body  []byte // of the last record
}

func (c *chunkReader) fill() error {
	if c.ended {
		return errors.New("it ends within a record")
	}
	var head [chunkHeader]byte
	if _, err := io.ReadFull(c.r, head[:4]); err != nil {
		return cutShort(err)
	}
	length := binary.BigEndian.Uint32(head[:])
	if length == 0 {
		c.ended = true
		return errors.New("it ends before its trailer")
	}
	if length > chunkSize {
		return fmt.Errorf("a chunk has %d bytes, over %d: it was altered", length, chunkSize)
	}
	if _, err := io.ReadFull(c.r, head[4:]); err != nil {
		return cutShort(err)
	}
	if c.buf == nil {
		c.buf = make([]byte, chunkSize)
	}
	c.rest = c.buf[:length]
	if _, err := io.ReadFull(c.r, c.rest); err != nil {
		return cutShort(err)
	}
	if crc32.Checksum(c.rest, castagnoli) != binary.BigEndian.Uint32(head[4:]) {
		return errors.New("the CRC of a chunk does not match: it was altered")
	}
	c.sum.Write(c.rest)
	return nil
}

// ReadByte makes it readable by binary.ReadUvarint.
func (c *chunkReader) ReadByte() (byte, error) {
	if len(c.rest) == 0 {
		if err := c.fill(); err != nil {
			return 0, err
		}
	}
	b := c.rest[0]
	c.rest = c.rest[1:]
	return b, nil
}

// record is the next one; its body is valid until the next call. Memory grows with
// the bytes that came, not with the length that is claimed.
func (c *chunkReader) record() (kind byte, body []byte, err error) {
	if kind, err = c.ReadByte(); err != nil {
		return 0, nil, err
	}
	length, err := binary.ReadUvarint(c)
	if err != nil {
		return 0, nil, err
	}
	if length > maxRecord {
		return 0, nil, fmt.Errorf("a record has %d bytes, over %d", length, maxRecord)
	}
	c.body = c.body[:0]
	for uint64(len(c.body)) < length {
		if len(c.rest) == 0 {
			if err := c.fill(); err != nil {
				return 0, nil, err
			}
		}
		n := min(len(c.rest), int(length)-len(c.body))
		c.body = append(c.body, c.rest[:n]...)
		c.rest = c.rest[n:]
	}
	return kind, c.body, nil
}

// end reads what follows the trailer.
func (c *chunkReader) end() error {
	if len(c.rest) != 0 {
		return errors.New("there are records after its trailer")
	}
	var tail [4 + sha256.Size]byte
	if _, err := io.ReadFull(c.r, tail[:]); err != nil {
		return cutShort(err)
	}
	if binary.BigEndian.Uint32(tail[:]) != 0 {
		return errors.New("there are chunks after its trailer")
	}
	if !bytes.Equal(c.sum.Sum(nil), tail[4:]) {
		return errors.New("its SHA-256 does not match: it was altered")
	}
	if n, err := c.r.Read(tail[:1]); n != 0 {
		return errors.New("there are bytes after its end")
	} else if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

// loader puts records into a state.
type loader struct {
	s      *State
	counts [recordEnd]uint64
	total  uint64
}

func (l *loader) load(kind byte, body []byte) error {
	if l.total++; l.total > maxRecords {
		return fmt.Errorf("it has over %d records", maxRecords)
	}
	if kind >= recordIgnorable {
		return nil
	}
	if kind == 0 || kind >= recordEnd {
		return fmt.Errorf("a record has kind %d, which this release does not know; upgrade this node", kind)
	}
	l.counts[kind]++
	if (l.total == 1) != (kind == recordScalars) {
		return errors.New("its numbers do not stand at the beginning")
	}
	s := l.s
	switch kind {
	case recordScalars:
		return s.scalars.decode(body)
	case recordCluster:
		return load(l, &s.cluster, body, &statev1.Cluster{}, func(*statev1.Cluster) string { return "" }, nil)
	case recordMember:
		return load(l, &s.members, body, &statev1.Member{}, (*statev1.Member).GetId, ca.CheckKeyID)
	case recordAuthority:
		return load(l, &s.authorities, body, &statev1.Authority{}, (*statev1.Authority).GetId, ca.CheckKeyID)
	case recordToken:
		return load(l, &s.tokens, body, &statev1.Token{}, (*statev1.Token).GetId, ca.CheckTokenID)
	case recordAgent:
		return load(l, &s.agents, body, &statev1.Agent{}, (*statev1.Agent).GetName, ca.CheckLabel)
	case recordEntry:
		if err := s.entries.load(body, &s.sum); err != nil {
			return fmt.Errorf("an entry is malformed: %w", err)
		}
		return nil
	case recordObject:
		return load(l, &s.objects, body, &statev1.Object{}, ObjectKey, notEmpty)
	case recordForeign:
		return load(l, &s.foreign, body, &statev1.ForeignBundle{}, (*statev1.ForeignBundle).GetTrustDomain, notEmpty)
	case recordStaged:
		return load(l, &s.staged, body, &statev1.Staged{}, stagedKey, nil)
	case recordPending:
		return load(l, &s.pending, body, &statev1.PendingChange{}, (*statev1.PendingChange).GetId, nil)
	default: // recordDistrust
		return load(l, &s.distrust, body, &statev1.Distrust{}, (*statev1.Distrust).GetId, notEmpty)
	}
}

func notEmpty(key string) error {
	if key == "" {
		return errors.New("it has no name")
	}
	return nil
}

func load[R proto.Message](l *loader, t *table[R], body []byte, r R, keyOf func(R) string, check func(string) error) error {
	if err := proto.Unmarshal(body, r); err != nil {
		return fmt.Errorf("a record does not decode: %w", err)
	}
	key := keyOf(r)
	if check != nil {
		if err := check(key); err != nil {
			return fmt.Errorf("a record is malformed: %w", err)
		}
	}
	if _, ok := t.get(key); ok {
		return fmt.Errorf("it holds %.300q twice", key)
	}
	l.s.sum.add(hashRecord(r))
	t.put(key, r)
	return nil
}

// finish compares with the trailer and builds what is derived.
func (l *loader) finish(trailer []byte) error {
	s := l.s
	if len(trailer) < 1+sha256.Size {
		return errors.New("its trailer is malformed")
	}
	format, checksum, rest := trailer[0], trailer[1:1+sha256.Size], trailer[1+sha256.Size:]
	for kind := recordScalars; kind < recordEnd; kind++ {
		if kind == recordTrailer {
			continue
		}
		count, size := binary.Uvarint(rest)
		if size <= 0 {
			return errors.New("its trailer is malformed")
		}
		if count != l.counts[kind] {
			return fmt.Errorf("it holds %d records of kind %d, its trailer says %d", l.counts[kind], kind, count)
		}
		rest = rest[size:]
	}
	if sum := s.checksum(); format == ChecksumFormat && !bytes.Equal(checksum, sum[:]) {
		return errors.New("the checksum of the state does not match: it was altered or written by a faulty node")
	}
	cluster := s.Cluster()
	if cluster == nil {
		if l.total > 1 {
			return errors.New("it has records but no cluster")
		}
		return nil
	}
	td, err := ca.ParseTrustDomain(cluster.GetTrustDomain())
	if err != nil {
		return err
	}
	s.td, s.lifetimes = td, ca.LifetimesOf(cluster.GetLifetimes())
	for _, part := range s.staged.rows {
		s.stagedBytes += stagedSize(part)
	}
	for _, agent := range s.agents.rows {
		if other, ok := s.agentByKey[agent.GetKeyId()]; ok {
			return fmt.Errorf("agents %s and %s have the same key", other, agent.GetName())
		}
		s.agentByKey[agent.GetKeyId()] = agent.GetName()
	}
	if s.tables, err = compile(td, cluster.GetDev(), s.objects.sorted()); err != nil {
		return fmt.Errorf("its catalogue does not hold together: %w", err)
	}
	s.countShares()
	s.use.keys = map[string]*Foreign{}
	for _, b := range s.foreign.rows {
		s.use.keys[b.GetTrustDomain()] = ReadForeign(b)
	}
	if s.hardened() {
		s.use.usable, s.use.dropped = s.judge(s.use.keys)
	}
	return nil
}
