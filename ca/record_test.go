package ca

import (
	"bytes"
	"encoding/hex"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

func recordKinds() []proto.Message {
	return []proto.Message{
		&statev1.Cluster{}, &statev1.Member{}, &statev1.Authority{}, &statev1.Token{}, &statev1.Agent{}, &statev1.Entry{},
		&statev1.Object{}, &statev1.ForeignBundle{}, &statev1.Distrust{}, &statev1.Staged{},
	}
}

// variants calls back with m as it is, with each of its fields set alone, deeply, and
// with all of them set.
func variants(m protoreflect.Message, back func(path string)) {
	fields := m.Descriptor().Fields()
	back(string(m.Descriptor().Name()))
	for i := range fields.Len() {
		f := fields.Get(i)
		at := string(f.FullName())
		switch {
		case f.IsList() && f.Kind() == protoreflect.MessageKind:
			list := m.Mutable(f).List()
			list.AppendMutable()
			variants(list.AppendMutable().Message(), func(p string) { back(at + "/" + p) })
		case f.IsList():
			list := m.Mutable(f).List()
			list.Append(sampleOf(f, 1))
			list.Append(sampleOf(f, 2))
			back(at)
		case f.Kind() == protoreflect.MessageKind:
			variants(m.Mutable(f).Message(), func(p string) { back(at + "/" + p) })
		default:
			m.Set(f, sampleOf(f, 300))
			back(at)
		}
		if f.ContainingOneof() != nil {
			m.Clear(f)
		}
	}
	back(string(m.Descriptor().Name()) + " with all")
	for i := range fields.Len() {
		m.Clear(fields.Get(i))
	}
}

func sampleOf(f protoreflect.FieldDescriptor, n int64) protoreflect.Value {
	switch f.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString("ü" + string(rune('a'+n%26)))
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte{0, byte(n)})
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(uint32(n))
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(uint64(n) << 40)
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(int32(-n))
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(-n)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(n))
	}
	panic("no sample of " + f.Kind().String())
}

// Every field of every record is written, in protobuf that decodes to the same record,
// and records that differ are written differently.
func TestRecordsHaveOneEncoding(t *testing.T) {
	for _, record := range recordKinds() {
		seen := map[string]proto.Message{}
		n := 0
		variants(record.ProtoReflect(), func(path string) {
			n++
			encoded := AppendRecord(nil, record)
			again := record.ProtoReflect().New().Interface()
			if err := proto.Unmarshal(encoded, again); err != nil {
				t.Fatalf("%s: %v", path, err)
			}
			if !proto.Equal(record, again) {
				t.Errorf("%s is read back as another record", path)
			}
			if other := seen[string(encoded)]; other != nil && !proto.Equal(other, record) {
				t.Errorf("%s is written as another record", path)
			}
			seen[string(encoded)] = proto.Clone(record)
			ascending(t, path, encoded)
			if !bytes.Equal(AppendRecord(nil, again), encoded) {
				t.Errorf("%s is written differently once it was read", path)
			}
			if library, err := (proto.MarshalOptions{Deterministic: true}).Marshal(record); err != nil || proto.Size(record) != len(encoded) {
				t.Errorf("%s: %d bytes, the library writes %d (%v)", path, len(encoded), len(library), err)
			}
		})
		if n < 6 {
			t.Errorf("%T: only %d variants", record, n)
		}
	}
}

func ascending(t *testing.T, path string, b []byte) {
	t.Helper()
	last := protowire.Number(0)
	for len(b) > 0 {
		number, _, n := protowire.ConsumeField(b)
		if n < 0 || number < last {
			t.Fatalf("%s: field %d after %d", path, number, last)
		}
		last, b = number, b[n:]
	}
}

// Whoever does not know a field has the hash of the author all the same: what is not
// known stands where it stood.
func TestUnknownFieldsAreHashed(t *testing.T) {
	entry := &statev1.Entry{Id: "entry/a", Path: "/a", Selectors: []string{"unix:uid:1", "unix:gid:1"}, X509SvidSeconds: 300, NodeSelectors: []string{"token:rack:r1"}}
	author := AppendRecord(nil, entry)
	received := &statev1.Token{} // knows other numbers and kinds; what does not fit is unknown to it
	if err := proto.Unmarshal(author, received); err == nil && !bytes.Equal(AppendRecord(nil, received), author) {
		t.Errorf("%x was written as %x", author, AppendRecord(nil, received))
	}

	// A later release's entry: fields between, in front of and behind those that are known,
	// one of them twice.
	later := protowire.AppendTag(nil, 1, protowire.BytesType)
	later = protowire.AppendString(later, "entry/a")
	later = protowire.AppendTag(later, 14, protowire.VarintType)
	later = protowire.AppendVarint(later, 7)
	later = protowire.AppendTag(later, 100, protowire.BytesType)
	later = protowire.AppendString(later, "token:rack:r1")
	for _, s := range []string{"z", "a"} {
		later = protowire.AppendTag(later, 5000, protowire.BytesType)
		later = protowire.AppendString(later, s)
	}
	got := &statev1.Entry{}
	if err := proto.Unmarshal(later, got); err != nil {
		t.Fatal(err)
	}
	if again := AppendRecord(nil, got); !bytes.Equal(again, later) {
		t.Errorf("%x was written as %x", later, again)
	}
	other := &statev1.Entry{Id: "entry/a", NodeSelectors: []string{"token:rack:r1"}}
	if RecordHash(got) == RecordHash(other) {
		t.Error("a field that is not known is not hashed")
	}
	if RecordHash(other) != RecordHash(proto.Clone(other)) { // control
		t.Error("equal records have different hashes")
	}
}

// The encoding is frozen: nodes and agents of two releases compare hashes of it.
func TestRecordIsFrozen(t *testing.T) {
	record := &statev1.Entry{
		Id: "service/accounts", Path: "/accounts", Hosts: []string{"h1", "h2"}, Selectors: []string{"unix:uid:1000"}, X509SvidSeconds: 300,
		DnsNames: []string{"accounts.banking.example"}, FederatesWith: []string{"trading.example"}, Role: statev1.Role_ROLE_GATEWAY,
		Revision: 1<<44 | 17, Hint: "h", JwtSvidSeconds: 60, WitSvidSeconds: 61, NodeSelectors: []string{"token:rack:r1"},
	}
	const want = "823b5f98bf7ed78d680563ac9d9d2c76a0cf10268773b9042cd99ae13e646ed2"
	hash := RecordHash(record)
	if got := hex.EncodeToString(hash[:]); got != want {
		t.Errorf("hash %s, was %s", got, want)
	}
}

// No record has what AppendRecord cannot write.
func TestRecordsHaveNoMaps(t *testing.T) {
	var look func(m protoreflect.MessageDescriptor, seen map[protoreflect.FullName]bool)
	fields := 0
	look = func(m protoreflect.MessageDescriptor, seen map[protoreflect.FullName]bool) {
		if seen[m.FullName()] {
			return
		}
		seen[m.FullName()] = true
		for i := range m.Fields().Len() {
			f := m.Fields().Get(i)
			fields++
			if f.IsMap() || f.Kind() == protoreflect.GroupKind || m.ExtensionRanges().Len() > 0 {
				t.Errorf("%s is a map, a group or extensible: it has no canonical encoding", f.FullName())
			}
			if f.Kind() == protoreflect.MessageKind {
				look(f.Message(), seen)
			}
		}
	}
	for _, record := range recordKinds() {
		look(record.ProtoReflect().Descriptor(), map[protoreflect.FullName]bool{})
	}
	if fields < 50 {
		t.Errorf("only %d fields were looked at", fields)
	}
}

func FuzzRecord(f *testing.F) {
	for _, record := range recordKinds() {
		variants(record.ProtoReflect(), func(string) { f.Add(AppendRecord(nil, record)) })
	}
	f.Add([]byte{0xf8, 0x07, 1, 0x0a, 1, 'a', 0xf8, 0x07, 2})
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, record := range []proto.Message{&statev1.Entry{}, &statev1.Object{}} {
			if proto.Unmarshal(b, record) != nil {
				continue
			}
			encoded := AppendRecord(nil, record)
			again := record.ProtoReflect().New().Interface()
			if err := proto.Unmarshal(encoded, again); err != nil {
				t.Fatal(err)
			}
			if twice := AppendRecord(nil, again); !bytes.Equal(twice, encoded) {
				t.Fatalf("%x, then %x", encoded, twice)
			}
		}
	})
}

func BenchmarkRecordHash(b *testing.B) {
	record := &statev1.Entry{
		Id: "service/accounts", Path: "/accounts", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1000"},
		DnsNames: []string{"accounts.banking.example"}, Revision: 1<<44 | 17,
	}
	b.ReportAllocs()
	for b.Loop() {
		RecordHash(record)
	}
}
