package ca

import (
	"crypto/sha256"
	"fmt"
	"math"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// SyncLevel is what this release understands of Sync, as its Hello says. A release that
// adds a kind of object, or a field that restricts, to what subscribers are told raises it
// by one, once, and adds a row for each to ca/feed/level.go. Other fields need no row: who
// does not know them passes them over.
//
//	0  releases before levels
//	1  levels; requests to sign name the entry's record; instances have ids
//	2  role bindings
const SyncLevel = 2

// LevelInstanceIDs is the first level of Sync at which an agent's instances of one service
// are told apart.
const LevelInstanceIDs = 1

// RecordHash identifies the content of a record: the SHA-256 of AppendRecord.
func RecordHash(record proto.Message) [sha256.Size]byte {
	var buffer [512]byte
	return sha256.Sum256(AppendRecord(buffer[:0], record))
}

// AppendRecord appends the one encoding of a record that processes of different releases
// agree on. It is protobuf, so any protobuf library reads it: fields ascending by number,
// none that has its default, numbers in their shortest form, repeated numbers packed.
//
// Fields that this release does not know stand in their place with the bytes that came. So
// whoever received a record gets the bytes that its author wrote, of a later release too.
// protobuf's own deterministic marshalling promises that for one binary only.
//
// Records have no maps, groups or extensions: a test holds the API to that.
func AppendRecord(b []byte, record proto.Message) []byte {
	return appendMessage(b, record.ProtoReflect())
}

// recordField is one populated field, or one that is not known.
type recordField struct {
	number  protowire.Number
	field   protoreflect.FieldDescriptor // nil: raw
	value   protoreflect.Value
	unknown []byte
}

func appendMessage(b []byte, m protoreflect.Message) []byte {
	var buffer [16]recordField
	fields := buffer[:0]
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		fields = append(fields, recordField{number: f.Number(), field: f, value: v})
		return true
	})
	for raw := m.GetUnknown(); len(raw) > 0; {
		number, _, n := protowire.ConsumeField(raw)
		if n < 0 { // the decoder has checked it
			panic(fmt.Sprintf("ca: the unknown fields of %s are malformed", m.Descriptor().FullName()))
		}
		fields = append(fields, recordField{number: number, unknown: raw[:n]})
		raw = raw[n:]
	}
	// Stable: a repeated field that is not known keeps its order.
	slices.SortStableFunc(fields, func(x, y recordField) int { return int(x.number) - int(y.number) })
	for _, f := range fields {
		switch {
		case f.field == nil:
			b = append(b, f.unknown...)
		case f.field.IsMap():
			panic("ca: a record has a map: " + string(f.field.FullName()))
		case f.field.IsList():
			b = appendList(b, f.field, f.value.List())
		default:
			b = protowire.AppendTag(b, f.number, wireType(f.field.Kind()))
			b = appendValue(b, f.field.Kind(), f.value)
		}
	}
	return b
}

func appendList(b []byte, f protoreflect.FieldDescriptor, list protoreflect.List) []byte {
	kind := f.Kind()
	if wireType(kind) == protowire.BytesType {
		for i := range list.Len() {
			b = protowire.AppendTag(b, f.Number(), protowire.BytesType)
			b = appendValue(b, kind, list.Get(i))
		}
		return b
	}
	var packed []byte
	for i := range list.Len() {
		packed = appendValue(packed, kind, list.Get(i))
	}
	b = protowire.AppendTag(b, f.Number(), protowire.BytesType)
	return protowire.AppendBytes(b, packed)
}

func wireType(kind protoreflect.Kind) protowire.Type {
	switch kind {
	case protoreflect.StringKind, protoreflect.BytesKind, protoreflect.MessageKind:
		return protowire.BytesType
	case protoreflect.Fixed32Kind, protoreflect.Sfixed32Kind, protoreflect.FloatKind:
		return protowire.Fixed32Type
	case protoreflect.Fixed64Kind, protoreflect.Sfixed64Kind, protoreflect.DoubleKind:
		return protowire.Fixed64Type
	case protoreflect.GroupKind:
		panic("ca: a record has a group")
	default:
		return protowire.VarintType
	}
}

func appendValue(b []byte, kind protoreflect.Kind, v protoreflect.Value) []byte {
	switch kind {
	case protoreflect.BoolKind:
		return protowire.AppendVarint(b, protowire.EncodeBool(v.Bool()))
	case protoreflect.EnumKind:
		return protowire.AppendVarint(b, uint64(int64(v.Enum())))
	case protoreflect.Int32Kind, protoreflect.Int64Kind:
		return protowire.AppendVarint(b, uint64(v.Int()))
	case protoreflect.Sint32Kind, protoreflect.Sint64Kind:
		return protowire.AppendVarint(b, protowire.EncodeZigZag(v.Int()))
	case protoreflect.Uint32Kind, protoreflect.Uint64Kind:
		return protowire.AppendVarint(b, v.Uint())
	case protoreflect.Fixed32Kind:
		return protowire.AppendFixed32(b, uint32(v.Uint()))
	case protoreflect.Sfixed32Kind:
		return protowire.AppendFixed32(b, uint32(v.Int()))
	case protoreflect.FloatKind:
		return protowire.AppendFixed32(b, math.Float32bits(float32(v.Float())))
	case protoreflect.Fixed64Kind:
		return protowire.AppendFixed64(b, v.Uint())
	case protoreflect.Sfixed64Kind:
		return protowire.AppendFixed64(b, uint64(v.Int()))
	case protoreflect.DoubleKind:
		return protowire.AppendFixed64(b, math.Float64bits(v.Float()))
	case protoreflect.StringKind:
		return protowire.AppendString(b, v.String())
	case protoreflect.BytesKind:
		return protowire.AppendBytes(b, v.Bytes())
	default: // a message, in front of which stands its length
		var buffer [256]byte
		return protowire.AppendBytes(b, appendMessage(buffer[:0], v.Message()))
	}
}
