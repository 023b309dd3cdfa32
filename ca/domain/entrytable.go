package domain

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"math"
	"slices"
	"time"
	"unicode/utf8"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/selector"
)

// entryTable holds the registration entries, of which there may be a million, as bytes:
// the encoding that the checksum is made of, in slabs without a pointer, so that an entry
// costs what it says and the garbage collector does not look at it. Reads decode.
//
// Bytes that were written stay as they are: a change is written behind, and what it
// replaces is dead. So a snapshot is a list of places. A slab that is half dead is
// written anew and left to whoever still reads it.
type entryTable struct {
	slabs   [][]byte // nil: given back
	dead    []int    // bytes, of each slab
	current int      // slab that is written to
	rows    []uint64 // place of each row: slab and offset; rows keep their number
	unused  []uint32 // numbers of rows

	byID   orderedRows
	onHost map[string]*orderedRows // by agent name
	lives  map[uint32]int          // entries by the life that they ask for, in seconds
	weak   int                     // entries of which any user of their hosts could get SVIDs

	scratch []byte
}

const (
	slabSize = 1 << 20

	// In front of an entry's encoding stand its row, its length and, since it is hashed
	// together with it, the format of the checksum.
	entryHeader = 4 + 4 + 1

	noPlace = math.MaxUint64 // of a row that is not used
)

func (t *entryTable) len() int { return t.byID.n }

// raw is an entry's encoding as it is stored, behind the format.
func (t *entryTable) raw(row uint32) []byte { return rawEntry(t.slabs, t.rows[row]) }

func rawEntry(slabs [][]byte, place uint64) []byte {
	at := slabs[place>>32][uint32(place):]
	n := binary.LittleEndian.Uint32(at[4:])
	return at[entryHeader : entryHeader+n : entryHeader+n]
}

// idOf is the id in an encoding that was checked.
func idOf(raw []byte) []byte {
	if n := raw[1]; n < 0x80 {
		return raw[2 : 2+n]
	}
	r := entryReader{b: raw[1:]}
	return r.text()
}

func (t *entryTable) compareID(id []byte) func(row uint32) int {
	return func(row uint32) int { return bytes.Compare(idOf(t.raw(row)), id) }
}

func (t *entryTable) row(id string) (row uint32, ok bool) {
	block, i, ok := t.byID.find(t.compareID([]byte(id)))
	if !ok {
		return 0, false
	}
	return t.byID.blocks[block][i], true
}

// get decodes the entry with that id. The record is the caller's.
func (t *entryTable) get(id string) (*statev1.Entry, bool) {
	row, ok := t.row(id)
	if !ok {
		return nil, false
	}
	return decodeStored(t.raw(row)), true
}

// from yields the entries whose id is after a given one, by id.
func (t *entryTable) from(after string) iter.Seq[*statev1.Entry] {
	return func(yield func(*statev1.Entry) bool) {
		for raw := range t.rawFrom(after) {
			if !yield(decodeStored(raw)) {
				return
			}
		}
	}
}

func (t *entryTable) rawFrom(after string) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		block, i, found := t.byID.find(t.compareID([]byte(after)))
		if found {
			i++
		}
		for ; block < len(t.byID.blocks); block, i = block+1, 0 {
			for ; i < len(t.byID.blocks[block]); i++ {
				if !yield(t.raw(t.byID.blocks[block][i])) {
					return
				}
			}
		}
	}
}

// onHostOf are the entries of a host, by id.
func (t *entryTable) onHostOf(agent string) []*statev1.Entry {
	entries := []*statev1.Entry{}
	if rows := t.onHost[agent]; rows != nil {
		entries = slices.Grow(entries, rows.n)
		for _, block := range rows.blocks {
			for _, row := range block {
				entries = append(entries, decodeStored(t.raw(row)))
			}
		}
	}
	return entries
}

func (t *entryTable) countOnHost(agent string) int {
	if rows := t.onHost[agent]; rows != nil {
		return rows.n
	}
	return 0
}

// put stores an entry, in place of one of the same id, and keeps the sum.
func (t *entryTable) put(e *statev1.Entry, sum *setHash) {
	enc := encoder{b: t.scratch[:0]}
	enc.record(e)
	t.scratch = enc.b
	v, err := viewEntry(enc.b, false)
	if err != nil {
		panic("domain: an entry that was checked does not read back: " + err.Error())
	}
	block, i, replaces := t.byID.find(t.compareID(v.id))
	if replaces {
		t.forget(t.byID.blocks[block][i], sum)
	}
	t.add(block, i, replaces, enc.b, v, sum)
}

// load stores the encoding of an entry that comes from a snapshot.
func (t *entryTable) load(raw []byte, sum *setHash) error {
	v, err := viewEntry(raw, true)
	switch {
	case err != nil:
		return err
	case len(v.id) == 0:
		return errors.New("it has no name")
	}
	block, i, twice := t.byID.find(t.compareID(v.id))
	if twice {
		return fmt.Errorf("it holds %.300q twice", v.id)
	}
	t.add(block, i, false, raw, v, sum)
	return nil
}

// add stores an encoding where find says that its id is, or would be.
func (t *entryTable) add(block, i int, replaces bool, raw []byte, v entryView, sum *setHash) {
	var row uint32
	switch {
	case replaces:
		row = t.byID.blocks[block][i]
	case len(t.unused) > 0:
		row, t.unused = last(t.unused), t.unused[:len(t.unused)-1]
	default:
		row = uint32(len(t.rows))
		t.rows = append(t.rows, 0)
	}
	t.write(row, raw)
	sum.add(t.digest(row))
	if !replaces {
		t.byID.insertAt(block, i, row)
	}
	if t.onHost == nil {
		t.onHost, t.lives = map[string]*orderedRows{}, map[uint32]int{}
	}
	for host := range v.hosts() {
		rows := t.onHost[string(host)]
		if rows == nil {
			rows = new(orderedRows)
			t.onHost[string(host)] = rows
		}
		if block, i, twice := rows.find(t.compareID(v.id)); !twice {
			rows.insertAt(block, i, row)
		}
	}
	t.lives[v.life]++
	if v.weak {
		t.weak++
	}
}

// remove drops an entry, if it is there.
func (t *entryTable) remove(id string, sum *setHash) bool {
	row, ok := t.row(id)
	if !ok {
		return false
	}
	t.byID.remove(t.compareID([]byte(id)))
	t.forget(row, sum)
	t.unused = append(t.unused, row)
	return true
}

// forget takes a row out of the sum and of all indexes but the first, and leaves its
// bytes dead.
func (t *entryTable) forget(row uint32, sum *setHash) {
	raw := t.raw(row)
	v, _ := viewEntry(raw, false)
	sum.remove(t.digest(row))
	for host := range v.hosts() {
		rows := t.onHost[string(host)]
		if rows == nil {
			continue // the entry names it twice
		}
		if rows.remove(t.compareID(v.id)); rows.n == 0 {
			delete(t.onHost, string(host))
		}
	}
	if t.lives[v.life]--; t.lives[v.life] == 0 {
		delete(t.lives, v.life)
	}
	if v.weak {
		t.weak--
	}
	slab := int(t.rows[row] >> 32)
	t.rows[row] = noPlace
	t.dead[slab] += entryHeader + len(raw)
	if slab != t.current {
		t.tidy(slab)
	}
}

// digest is hashRecord of a row.
func (t *entryTable) digest(row uint32) [4]uint64 {
	place := t.rows[row]
	at := t.slabs[place>>32][uint32(place):]
	return hashEncoding(at[entryHeader-1 : entryHeader+binary.LittleEndian.Uint32(at[4:])])
}

// write puts an encoding into the current slab and notes where.
func (t *entryTable) write(row uint32, raw []byte) {
	need := entryHeader + len(raw)
	if len(t.slabs) == 0 || cap(t.slabs[t.current])-len(t.slabs[t.current]) < need {
		t.open(max(slabSize, need))
	}
	slab := t.slabs[t.current]
	t.rows[row] = uint64(t.current)<<32 | uint64(len(slab))
	slab = binary.LittleEndian.AppendUint32(slab, row)
	slab = binary.LittleEndian.AppendUint32(slab, uint32(len(raw)))
	slab = append(slab, ChecksumFormat)
	t.slabs[t.current] = append(slab, raw...)
}

// open begins another slab.
func (t *entryTable) open(size int) {
	full := t.current
	t.current = slices.IndexFunc(t.slabs, func(slab []byte) bool { return slab == nil })
	if t.current < 0 {
		t.current = len(t.slabs)
		t.slabs, t.dead = append(t.slabs, nil), append(t.dead, 0)
	}
	t.slabs[t.current] = make([]byte, 0, size)
	if full != t.current {
		t.tidy(full)
	}
}

// tidy writes anew what lives in a slab of which more than half is dead.
func (t *entryTable) tidy(slab int) {
	old := t.slabs[slab]
	if t.dead[slab] <= len(old)/2 {
		return
	}
	for at := 0; at < len(old); {
		row, n := binary.LittleEndian.Uint32(old[at:]), int(binary.LittleEndian.Uint32(old[at+4:]))
		if t.rows[row] == uint64(slab)<<32|uint64(at) {
			t.write(row, old[at+entryHeader:at+entryHeader+n])
		}
		at += entryHeader + n
	}
	t.slabs[slab], t.dead[slab] = nil, 0
}

// longest is the longest life that any entry asks for.
func (t *entryTable) longest(l ca.Lifetimes) (life time.Duration) {
	for seconds := range t.lives {
		life = max(life, ca.SVIDLife(&statev1.Entry{X509SvidSeconds: seconds}, l))
	}
	return life
}

// entryPlaces are the entries at one moment, by id. They stay as they are while the
// table goes on.
type entryPlaces struct {
	slabs  [][]byte
	places []uint64
}

func (t *entryTable) places() entryPlaces {
	p := entryPlaces{slabs: slices.Clone(t.slabs), places: make([]uint64, 0, t.byID.n)}
	for _, block := range t.byID.blocks {
		for _, row := range block {
			p.places = append(p.places, t.rows[row])
		}
	}
	return p
}

// ---------------------------------------------------------------- encoding

// entryView is what the table must know of an encoding. It is part of it.
type entryView struct {
	id, path  []byte
	hostBytes []byte // number, texts
	life      uint32
	weak      bool // no selector says whose process it is for
}

// viewEntry reads an encoding without copying, and refuses what decodeEntry could not
// read or what would be written otherwise; strictly, also what is no text.
func viewEntry(raw []byte, strict bool) (v entryView, err error) {
	r := entryReader{b: raw, strict: strict}
	r.kind('E')
	v.id, v.path = r.text(), r.text()
	before := r.b
	r.skipTexts() // hosts
	v.hostBytes = before[:len(before)-len(r.b)]
	v.weak = true
	for range r.count() {
		text := r.text()
		v.weak = v.weak && !selector.Anchored(string(text))
	}
	v.life = r.uint32()
	r.skipTexts() // DNS names
	r.skipTexts() // federates with
	r.uint32()    // role
	r.number()    // revision
	r.text()      // hint
	r.uint32()    // JWT life
	r.uint32()    // WIT life
	if r.more() {
		r.skipTexts() // node selectors
	}
	return v, r.end()
}

func (v entryView) hosts() iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		r := entryReader{b: v.hostBytes}
		for range r.count() {
			if !yield(r.text()) {
				return
			}
		}
	}
}

// decodeEntry reads what encoder.record writes of an entry.
func decodeEntry(raw []byte) (*statev1.Entry, error) {
	r := entryReader{b: raw}
	r.kind('E')
	e := &statev1.Entry{
		Id:              string(r.text()),
		Path:            string(r.text()),
		Hosts:           r.texts(),
		Selectors:       r.texts(),
		X509SvidSeconds: r.uint32(),
		DnsNames:        r.texts(),
		FederatesWith:   r.texts(),
		Role:            statev1.Role(r.uint32()),
		Revision:        r.number(),
		Hint:            string(r.text()),
		JwtSvidSeconds:  r.uint32(),
		WitSvidSeconds:  r.uint32(),
	}
	if r.more() {
		e.NodeSelectors = r.texts()
	}
	return e, r.end()
}

// decodeStored decodes what was checked when it was stored.
func decodeStored(raw []byte) *statev1.Entry {
	e, err := decodeEntry(raw)
	if err != nil {
		panic("domain: a stored entry does not decode: " + err.Error())
	}
	return e
}

// entryReader reads the encoding of an entry. After the first fault it reads zeros.
type entryReader struct {
	b      []byte
	strict bool // texts must be UTF-8
	bad    string
}

func (r *entryReader) fail(why string) {
	if r.bad == "" {
		r.bad = why
	}
	r.b = nil
}

func (r *entryReader) end() error {
	switch {
	case r.bad != "":
		return errors.New(r.bad)
	case len(r.b) != 0:
		return errors.New("it has more fields than this release knows; upgrade this node")
	}
	return nil
}

// more tells whether a list follows that is only written when it holds something.
func (r *entryReader) more() bool {
	if len(r.b) > 0 && r.b[0] == 0 {
		r.fail("it has more fields than this release knows; upgrade this node")
	}
	return len(r.b) > 0
}

func (r *entryReader) kind(letter byte) {
	if len(r.b) == 0 || r.b[0] != letter {
		r.fail("it is no entry")
		return
	}
	r.b = r.b[1:]
}

// number reads a varint, in its shortest form only: equal entries have equal bytes.
func (r *entryReader) number() uint64 {
	n, size := binary.Uvarint(r.b)
	if size <= 0 || size > 1 && r.b[size-1] == 0 {
		r.fail("a number is malformed")
		return 0
	}
	r.b = r.b[size:]
	return n
}

func (r *entryReader) uint32() uint32 {
	n := r.number()
	if n > math.MaxUint32 {
		r.fail("a number is too large")
		return 0
	}
	return uint32(n)
}

func (r *entryReader) text() []byte {
	n := r.number()
	if n > uint64(len(r.b)) {
		r.fail("a text is cut short")
		return nil
	}
	text := r.b[:n:n]
	r.b = r.b[n:]
	if r.strict && !utf8.Valid(text) {
		r.fail("a text is not UTF-8")
	}
	return text
}

// count reads the length of a list, each item of which has at least a byte.
func (r *entryReader) count() int {
	n := r.number()
	if n > uint64(len(r.b)) {
		r.fail("a list is cut short")
		return 0
	}
	return int(n)
}

func (r *entryReader) texts() []string {
	n := r.count()
	if n == 0 {
		return nil
	}
	list := make([]string, n)
	for i := range list {
		list[i] = string(r.text())
	}
	return list
}

func (r *entryReader) skipTexts() {
	for range r.count() {
		r.text()
	}
}

// ---------------------------------------------------------------- order

// orderedRows are rows in an order that the caller knows, in blocks, so that neither a
// million of them nor one costs much.
type orderedRows struct {
	blocks [][]uint32 // none is empty
	n      int
}

const rowsPerBlock = 512

// find looks for the row for which compare is 0. Not found, it says where that row would
// be: block may be one beyond the last.
func (o *orderedRows) find(compare func(row uint32) int) (block, i int, found bool) {
	// The first block whose last row is not before.
	if n := len(o.blocks); n > 0 && compare(last(o.blocks[n-1])) < 0 {
		block = n // what is loaded in order is always added at the end
	} else {
		block, _ = slices.BinarySearchFunc(o.blocks, 0, func(b []uint32, _ int) int {
			if compare(last(b)) < 0 {
				return -1
			}
			return 1
		})
	}
	if block == len(o.blocks) {
		return block, 0, false
	}
	i, found = slices.BinarySearchFunc(o.blocks[block], 0, func(row uint32, _ int) int { return compare(row) })
	return block, i, found
}

func last(b []uint32) uint32 { return b[len(b)-1] }

// insertAt puts a row where find says that it would be.
func (o *orderedRows) insertAt(block, i int, row uint32) {
	o.n++
	if block == len(o.blocks) {
		if block == 0 || len(o.blocks[block-1]) == rowsPerBlock {
			o.blocks = append(o.blocks, []uint32{row})
			return
		}
		block--
		i = len(o.blocks[block])
	}
	rows := slices.Insert(o.blocks[block], i, row)
	o.blocks[block] = rows
	if len(rows) > rowsPerBlock {
		half := len(rows) / 2
		o.blocks[block] = slices.Clone(rows[:half])
		o.blocks = slices.Insert(o.blocks, block+1, slices.Clone(rows[half:]))
	}
}

func (o *orderedRows) remove(compare func(row uint32) int) {
	block, i, found := o.find(compare)
	if !found {
		return
	}
	o.n--
	if o.blocks[block] = slices.Delete(o.blocks[block], i, i+1); len(o.blocks[block]) == 0 {
		o.blocks = slices.Delete(o.blocks, block, block+1)
	}
}
