package client

import (
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

// maxSkipped bounds what is remembered of what a CA of a later release sent.
const maxSkipped = 32

// unknownIn names the fields of a message, at any depth, that this release does not know:
// "Service: field 300". A kind of object, or of a message, is such a field.
func unknownIn(m protoreflect.Message, names []string) []string {
	names = unknownFields(m, names)
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.Kind() != protoreflect.MessageKind:
		case f.IsList():
			for i := range v.List().Len() {
				names = unknownIn(v.List().Get(i).Message(), names)
			}
		default:
			names = unknownIn(v.Message(), names)
		}
		return len(names) < maxSkipped
	})
	return names
}

// unknownFields is unknownIn for the message alone.
func unknownFields(m protoreflect.Message, names []string) []string {
	for raw := m.GetUnknown(); len(raw) > 0 && len(names) < maxSkipped; {
		number, _, n := protowire.ConsumeField(raw)
		if n < 0 {
			break
		}
		raw = raw[n:]
		if name := fmt.Sprintf("%s: field %d", m.Descriptor().Name(), number); !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// unknownOf is unknownIn for a message of Sync, but for the instances of the presence lane:
// they come often, and hold no records.
func unknownOf(message *ententev1.SyncResponse) []string {
	if message.GetPresence() != nil {
		return unknownFields(message.ProtoReflect(), nil)
	}
	return unknownIn(message.ProtoReflect(), nil)
}

// cannotUse says why a distrust item cannot be used; empty: it can. One that names
// something in a way that this release does not know would name more without it.
func cannotUse(d *statev1.Distrust) string {
	if names := unknownIn(d.ProtoReflect(), nil); len(names) > 0 {
		return fmt.Sprintf("distrust %s: %s", d.GetId(), names[0])
	}
	return ""
}

// note remembers what a CA sent and this release does not know, and returns what is new.
func (s *Store) note(message *ententev1.SyncResponse) (news []string) {
	names := unknownOf(message)
	if len(names) == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	view := *s.view
	for _, name := range names {
		if !slices.Contains(view.Skipped, name) && len(view.Skipped) < maxSkipped {
			view.Skipped = append(slices.Clip(view.Skipped), name)
			news = append(news, name)
		}
	}
	if len(news) > 0 {
		s.publish(&view)
	}
	return news
}

// tooOld is what restricts and this process cannot enforce: as the CA says, and distrust
// items. Called with mu held.
func (s *Store) tooOld() []string {
	list := append(slices.Sorted(maps.Values(s.unusable)), s.state.TooOld...)
	return list[:min(len(list), maxSkipped)]
}
