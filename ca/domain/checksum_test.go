package domain

import (
	"encoding/hex"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain/domaintest"
)

func TestSetHash(t *testing.T) {
	a, b := hashRecord(&statev1.Agent{Name: "a"}), hashRecord(&statev1.Agent{Name: "b"})
	var h, g setHash
	h.add(a)
	h.add(b)
	g.add(b)
	g.add(a)
	if h != g {
		t.Error("order matters")
	}
	g.add(b)
	if h == g {
		t.Error("a record twice counts once")
	}
	g.remove(b)
	g.remove(a)
	g.remove(b)
	if g != (setHash{}) {
		t.Error("removing does not undo adding")
	}
	g.remove(a) // below zero and back
	g.add(a)
	if g != (setHash{}) {
		t.Error("the sum does not wrap")
	}
}

// Every field of every record is in the hash: a field that is added to the API and
// forgotten here would let replicas diverge unnoticed.
func TestEveryFieldIsHashed(t *testing.T) {
	for _, record := range []proto.Message{
		&statev1.Cluster{}, &statev1.Member{}, &statev1.Authority{}, &statev1.Token{}, &statev1.Agent{},
		&statev1.Entry{}, &statev1.Object{}, &statev1.ForeignBundle{}, &statev1.Distrust{}, &statev1.Staged{},
	} {
		seen := map[[4]uint64]string{}
		fields := 0
		eachField(record.ProtoReflect(), "", func(path string) {
			fields++
			h := hashRecord(record)
			if other, ok := seen[h]; ok {
				t.Errorf("%s: the hash does not tell %q from %q", record.ProtoReflect().Descriptor().Name(), path, other)
			}
			seen[h] = path
		})
		if fields < 4 {
			t.Errorf("%s: only %d fields", record.ProtoReflect().Descriptor().Name(), fields)
		}
	}
}

// An object of a kind without an encoding of its own is hashed whole as well: what writes it
// tells every field of the kinds that there are.
func TestLaterKindsAreHashedWhole(t *testing.T) {
	kinds := (&statev1.Object{}).ProtoReflect().Descriptor().Oneofs().ByName("kind").Fields()
	for i := range kinds.Len() {
		o := &statev1.Object{}
		seen := map[string]string{}
		eachField(o.ProtoReflect().Mutable(kinds.Get(i)).Message(), "", func(path string) {
			var e encoder
			e.laterKind(o)
			if other, ok := seen[string(e.b)]; ok {
				t.Errorf("%s: the encoding does not tell %q from %q", kinds.Get(i).Name(), path, other)
			}
			seen[string(e.b)] = path
		})
		if len(seen) < 3 {
			t.Errorf("%s: only %d fields", kinds.Get(i).Name(), len(seen))
		}
	}
}

// eachField calls back with m as it is, and with each of its fields set alone,
// deeply.
func eachField(m protoreflect.Message, path string, back func(path string)) {
	back(path)
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		at := path + "." + string(f.Name())
		switch {
		case f.IsList():
			list := m.Mutable(f).List()
			if f.Kind() == protoreflect.MessageKind {
				eachField(list.AppendMutable().Message(), at, back)
			} else {
				list.Append(sample(f))
				back(at)
				list.Append(sample(f))
				back(at + " twice")
			}
		case f.Kind() == protoreflect.MessageKind:
			sub := m.Mutable(f).Message()
			// That an empty message is there says nothing, except of a choice.
			skip := f.ContainingOneof() == nil && (f.Message().Name() == "Lifetimes" || f.Message().Name() == "ApplyObjects")
			eachField(sub, at, func(p string) {
				if !(skip && p == at) {
					back(p)
				}
			})
		default:
			m.Set(f, sample(f))
			back(at)
		}
		m.Clear(f)
	}
}

func sample(f protoreflect.FieldDescriptor) protoreflect.Value {
	switch f.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString("x")
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte("x"))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(1)
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(1)
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(1)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(1)
	}
	panic("no sample of " + f.Kind().String())
}

// The format is frozen: replicas of two releases compare their checksums. If this
// fails, ChecksumFormat must move.
func TestChecksumIsFrozen(t *testing.T) {
	w := newWorld(t)
	w.must(objects(service("accounts", "h1"), gateway("gw-1", 1, "h1"), relationship("trading.example")))
	w.must(foreign("trading.example", "{}", 7))
	// As a record of the first release: Apply asked for no signature of the key then.
	a := w.authority("n1", "k1")
	a.PublicKey = domaintest.DER(0x30, []byte("public key k1"))
	a.Id = ca.KeyID(a.GetPublicKey())
	moment := func(unix int64) []byte {
		return domaintest.DER(0x17, []byte(time.Unix(unix, 0).UTC().Format("060102150405Z")))
	}
	der := domaintest.DER
	name := der(0x30, []byte{0x06, 0x03, 0x55, 0x1d, 0x11}, der(0x04, der(0x30, der(0x86, []byte("spiffe://banking.example")))))
	a.Certificate = der(0x30, der(0x30, der(0xa0, der(0x02, []byte{2})), der(0x02, []byte{1}), der(0x30), der(0x30),
		der(0x30, moment(a.GetNotBefore()), moment(a.GetNotAfter())), der(0x30), a.GetPublicKey(), der(0xa3, der(0x30, name))))
	w.must(prepare(a))
	const want = "0d4de5ef607d81ecd28bb9d4d3ecd586cab392bf0179766c3558067c29f0503b"
	if got := hex.EncodeToString(w.s.Checksum()); got != want {
		t.Errorf("checksum %s, was %s", got, want)
	}
}
