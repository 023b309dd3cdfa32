package domain

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

func sampleSnapshot(t testing.TB) []byte {
	w := newWorld(t)
	rng := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		w.apply(w.random(rng.IntN, everyKind, 12))
	}
	var b bytes.Buffer
	if _, err := w.s.Snapshot().WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestSnapshotOfNothing(t *testing.T) {
	var b bytes.Buffer
	if _, err := New().Snapshot().WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	s, err := Restore(&b)
	if err != nil || s.Cluster() != nil || !bytes.Equal(s.Checksum(), New().Checksum()) {
		t.Errorf("%v, %v", s, err)
	}
	if out := s.Apply(1, (&world{t: t, s: s}).initCommand()); out.Refused != nil {
		t.Error(out.Refused)
	}
}

func TestSnapshotDamaged(t *testing.T) {
	good := sampleSnapshot(t)
	if _, err := Restore(bytes.NewReader(good)); err != nil { // control
		t.Fatal(err)
	}
	if _, err := Restore(iotest.OneByteReader(bytes.NewReader(good))); err != nil {
		t.Errorf("in small pieces: %v", err)
	}
	for n := 0; n < len(good); n += 1 + n/50 {
		if _, err := Restore(bytes.NewReader(good[:n])); err == nil || !strings.Contains(err.Error(), "cut short") {
			t.Fatalf("cut after %d of %d bytes: %v", n, len(good), err)
		}
	}
	for i := 0; i < len(good); i += 1 + i/30 {
		for bit := range 8 {
			flipped := bytes.Clone(good)
			flipped[i] ^= 1 << bit
			if _, err := Restore(bytes.NewReader(flipped)); err == nil {
				t.Fatalf("bit %d of byte %d flipped, accepted", bit, i)
			}
		}
	}
	if _, err := Restore(bytes.NewReader(append(bytes.Clone(good), 0))); err == nil || !strings.Contains(err.Error(), "after its end") {
		t.Errorf("a byte more: %v", err)
	}
	broken := errors.New("input/output error")
	if _, err := Restore(io.MultiReader(bytes.NewReader(good[:len(good)/2]), iotest.ErrReader(broken))); !errors.Is(err, broken) {
		t.Errorf("a broken disk: %v", err)
	}
}

func TestSnapshotWriteFails(t *testing.T) {
	w := newWorld(t)
	if _, err := w.s.Snapshot().WriteTo(failing{}); err == nil || !strings.Contains(err.Error(), "no space") {
		t.Error(err)
	}
	a := &application{State: w.s, rev: w.s.revision}
	put(a, &w.s.objects, "Service/a", &statev1.Object{Owner: strings.Repeat("x", maxRecord)})
	if _, err := w.s.Snapshot().WriteTo(io.Discard); err == nil {
		t.Error("an oversized record was written: nobody could read it")
	}
}

type failing struct{}

func (failing) Write(b []byte) (int, error) { return len(b) / 2, errors.New("no space left on device") }

// wrap makes a snapshot, with right CRCs and digests, of any bytes.
func wrap(payload []byte) []byte {
	out := append([]byte(snapshotMagic), snapshotVersion)
	sum := sha256.New()
	for len(payload) > 0 {
		n := min(len(payload), chunkSize)
		out = binary.BigEndian.AppendUint32(out, uint32(n))
		out = binary.BigEndian.AppendUint32(out, crc32.Checksum(payload[:n], castagnoli))
		out = append(out, payload[:n]...)
		sum.Write(payload[:n])
		payload = payload[n:]
	}
	return append(out, sum.Sum(make([]byte, 4))...)
}

// records is what wrap wants, made of records and a trailer that fits.
type records struct {
	b      []byte
	counts [256]uint64
}

func (r *records) add(kind byte, body []byte) *records {
	r.counts[kind]++
	r.b = append(binary.AppendUvarint(append(r.b, kind), uint64(len(body))), body...)
	return r
}

func (r *records) message(kind byte, m proto.Message) *records {
	body, _ := proto.Marshal(m)
	return r.add(kind, body)
}

// done ends it; the checksum is of another format, so that it is not compared.
func (r *records) done() []byte {
	trailer := append([]byte{ChecksumFormat + 1}, make([]byte, sha256.Size)...)
	for kind := recordScalars; kind < recordEnd; kind++ {
		if kind == recordTrailer {
			continue
		}
		trailer = binary.AppendUvarint(trailer, r.counts[kind])
	}
	r.add(recordTrailer, trailer)
	return wrap(r.b)
}

// Well-formed snapshots that contradict themselves.
func TestSnapshotContradicts(t *testing.T) {
	start := func() *records { return new(records).add(recordScalars, scalars{applied: 5, revision: 5}.encode()) }
	cluster := &statev1.Cluster{TrustDomain: "banking.example"}
	agent := &statev1.Agent{Name: "h1", KeyId: "k"}
	tests := map[string]struct {
		data []byte
		says string
	}{
		"control":            {start().message(recordCluster, cluster).message(recordAgent, agent).done(), ""},
		"skipped":            {start().message(recordCluster, cluster).add(recordIgnorable, []byte("later")).done(), ""},
		"an unknown kind":    {start().message(recordCluster, cluster).add(recordEnd, nil).done(), "does not know"},
		"kind zero":          {start().add(0, nil).done(), "does not know"},
		"no numbers":         {new(records).message(recordCluster, cluster).done(), "at the beginning"},
		"numbers twice":      {start().add(recordScalars, scalars{}.encode()).done(), "at the beginning"},
		"bad numbers":        {new(records).add(recordScalars, []byte{1}).done(), "malformed"},
		"long numbers":       {new(records).add(recordScalars, append(scalars{}.encode(), 0)).done(), "trailing"},
		"two clusters":       {start().message(recordCluster, cluster).message(recordCluster, cluster).done(), "twice"},
		"no cluster":         {start().message(recordAgent, agent).done(), "no cluster"},
		"a bad trust domain": {start().message(recordCluster, &statev1.Cluster{TrustDomain: "X"}).done(), "trust domain"},
		"a record twice":     {start().message(recordCluster, cluster).message(recordAgent, agent).message(recordAgent, agent).done(), "twice"},
		"one key, two agents": {start().message(recordCluster, cluster).message(recordAgent, agent).
			message(recordAgent, &statev1.Agent{Name: "h2", KeyId: "k"}).done(), "same key"},
		"an agent with no name": {start().message(recordCluster, cluster).message(recordAgent, &statev1.Agent{}).done(), "malformed"},
		"an object of no kind":  {start().message(recordCluster, cluster).message(recordObject, &statev1.Object{}).done(), "malformed"},
		"no protobuf":           {start().add(recordCluster, []byte{0xff}).done(), "does not decode"},
		"a bad catalogue":       {start().message(recordCluster, cluster).message(recordObject, service("Bad")).done(), "catalogue"},
		"a short trailer":       {wrap(start().add(recordTrailer, []byte{1}).b), "trailer"},
		"a cut trailer":         {wrap(start().add(recordTrailer, make([]byte, 33)).b), "trailer"},
		"other counts":          {wrap(start().add(recordTrailer, make([]byte, 33+recordEnd)).b), "trailer says"},
		"no trailer":            {wrap(start().b), "before its trailer"},
		"after the trailer":     {wrap(append(start().message(recordCluster, cluster).payload(), 1, 0)), "after its trailer"},
		"an empty stream":       {wrap(nil), "before its trailer"},
		"a huge record":         {wrap(binary.AppendUvarint(append(start().b, recordAgent), 1<<40)), "over"},
		"a huge length":         {wrap(append(append(start().b, recordAgent), bytes.Repeat([]byte{0xff}, 11)...)), "overflow"},
		"a huge chunk":          {append(append([]byte(snapshotMagic), snapshotVersion), 0xff, 0xff, 0xff, 0xff), "a chunk has"},
		"another format":        {append([]byte(snapshotMagic), 9), "format 9"},
		"something else":        {bytes.Repeat([]byte("x"), 100), "not a snapshot"},
		"nothing":               {nil, "cut short"},
	}
	for name, test := range tests {
		_, err := Restore(bytes.NewReader(test.data))
		switch {
		case test.says == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)):
			t.Errorf("%s: %v, does not say %q", name, err, test.says)
		}
	}
	// The state's own checksum in the trailer is compared.
	forged := start().message(recordCluster, cluster)
	payload := forged.payload()
	payload[bytes.LastIndexByte(payload, ChecksumFormat+1)] = ChecksumFormat
	if _, err := Restore(bytes.NewReader(wrap(payload))); err == nil || !strings.Contains(err.Error(), "checksum of the state") {
		t.Errorf("a forged checksum: %v", err)
	}
}

// payload is the records with their trailer, not wrapped.
func (r *records) payload() []byte {
	r.done()
	return bytes.Clone(r.b)
}

func FuzzRestore(f *testing.F) {
	good := sampleSnapshot(f)
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add([]byte(snapshotMagic))
	f.Fuzz(func(t *testing.T, data []byte) {
		if s, err := Restore(bytes.NewReader(data)); err == nil {
			roundTrip(t, s)
		}
	})
}

// FuzzRestoreRecords goes past CRCs and digests.
func FuzzRestoreRecords(f *testing.F) {
	f.Add(new(records).add(recordScalars, scalars{applied: 5}.encode()).message(recordCluster, &statev1.Cluster{TrustDomain: "banking.example"}).payload())
	f.Add([]byte{recordScalars, 5, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, payload []byte) {
		if s, err := Restore(bytes.NewReader(wrap(payload))); err == nil {
			roundTrip(t, s)
		}
	})
}

func roundTrip(t *testing.T, s *State) {
	var b bytes.Buffer
	if _, err := s.Snapshot().WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	again, err := Restore(&b)
	if err != nil || !bytes.Equal(again.Checksum(), s.Checksum()) {
		t.Fatalf("what was accepted does not survive: %v", err)
	}
}
