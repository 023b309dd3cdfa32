package feed

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
)

// sinceLevel lists what subscribers below a level do not know (ca.SyncLevel) and must not
// be sent: kinds of objects, as the fields of Object's oneof, and fields that restrict. A
// subscriber of a lower level is told without it, as if it had not been set. Fields that
// permit or inform are not listed: who does not know them passes them over, and while there
// is a row above its level each subscriber costs a look at every object.
//
// A row that restricts says so: a deny rule, a field that narrows what its object permits.
// Who cannot enforce it is told that it is too old, and so are operators.
var sinceLevel = levels{
	"entente.state.v1.Object.role_binding": {level: 2},
}

type levels map[protoreflect.FullName]since

type since struct {
	level     uint32
	restricts bool
}

// MostTooOld bounds how many names of what a subscriber cannot enforce are listed.
const MostTooOld = 32

// below reports whether somebody at a level does not know something in the table.
func (l levels) below(level uint32) bool {
	for _, row := range l {
		if row.level > level {
			return true
		}
	}
	return false
}

// without returns the record as somebody at a level knows it: a copy, if that is less.
// left names the rows that were left out.
func (l levels) without(level uint32, record proto.Message) (known proto.Message, left []protoreflect.FullName) {
	if left = l.beyond(level, record.ProtoReflect(), nil, false); len(left) == 0 {
		return record, nil
	}
	known = proto.Clone(record)
	l.beyond(level, known.ProtoReflect(), nil, true)
	return known, left
}

// beyond finds the fields of a message, at any depth, that somebody at a level does not
// know, and clears them if asked to.
func (l levels) beyond(level uint32, m protoreflect.Message, left []protoreflect.FullName, clear bool) []protoreflect.FullName {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case l[f.FullName()].level > level:
			if left = append(left, f.FullName()); clear {
				m.Clear(f)
			}
		case f.Kind() == protoreflect.MessageKind && f.IsList():
			for i := range v.List().Len() {
				left = l.beyond(level, v.List().Get(i).Message(), left, clear)
			}
		case f.Kind() == protoreflect.MessageKind:
			left = l.beyond(level, v.Message(), left, clear)
		}
		return true
	})
	return left
}

// forLevel takes out of an update what the session's subscriber does not know, and says
// what of it restricts. Entries stay whole: their hash must be that of the signer's
// record, and who does not know a field passes it over.
func (s *Session) forLevel(st *domain.State, u *Update) {
	if !s.older {
		return
	}
	if u.Full || s.resumed {
		s.tooOld = map[string]string{}
		for _, o := range forSubscribers(st.Objects()) {
			s.look("object "+domain.ObjectKey(o), o)
		}
		for _, e := range s.entries(st) {
			s.look("entry "+e.GetId(), e)
		}
		for _, d := range s.feed.distrust(st) {
			s.look("distrust "+d.GetId(), d)
		}
	}
	u.Objects = s.objectsForLevel(u)
	u.Distrust = s.distrustForLevel(u.Distrust)
	for _, e := range u.Entries {
		s.look("entry "+e.GetId(), e)
	}
	for kind, keys := range map[string][]string{"object ": u.DeletedObjects, "entry ": u.DeletedEntries, "distrust ": u.DeletedDistrust} {
		for _, key := range keys {
			if kind != "object " || !u.withheld[key] {
				delete(s.tooOld, kind+key)
			}
		}
	}
	u.TooOld = s.restrictions()
	u.TooOldChanged = u.Full || s.resumed || !slices.Equal(u.TooOld, s.toldTooOld)
	s.toldTooOld = u.TooOld
}

// look notes what of a record restricts and the subscriber does not know.
func (s *Session) look(key string, record proto.Message) (known proto.Message) {
	known, left := s.feed.levels.without(s.who.Level, record)
	delete(s.tooOld, key)
	for _, name := range left {
		if row := s.feed.levels[name]; row.restricts {
			s.tooOld[key] = fmt.Sprintf("%s: %s (level %d)", key, name.Name(), row.level)
		}
	}
	return known
}

func (s *Session) objectsForLevel(u *Update) []*statev1.Object {
	objects := make([]*statev1.Object, 0, len(u.Objects))
	for _, o := range u.Objects {
		if known := s.look("object "+domain.ObjectKey(o), o).(*statev1.Object); known.GetKind() != nil {
			objects = append(objects, known)
			continue
		}
		if u.withheld == nil {
			u.withheld = map[string]bool{}
		}
		u.withheld[domain.ObjectKey(o)] = true
	}
	return objects
}

// distrustForLevel leaves items out that name something by a field that the subscriber
// does not know: without it they would name more, or nothing.
func (s *Session) distrustForLevel(items []*statev1.Distrust) []*statev1.Distrust {
	if !s.older {
		return items
	}
	told := make([]*statev1.Distrust, 0, len(items))
	for _, d := range items {
		key := "distrust " + d.GetId()
		known := s.look(key, d)
		if _, restricts := s.tooOld[key]; !restricts {
			told = append(told, known.(*statev1.Distrust))
		}
	}
	return told
}

// restrictions are what the subscriber cannot enforce, some of them if there are many.
func (s *Session) restrictions() []string {
	list := slices.Sorted(maps.Values(s.tooOld))
	return list[:min(len(list), MostTooOld)]
}

// Skipped takes the subscriber's word on what it was sent and does not know.
func (s *Session) Skipped(what []string) {
	s.feed.mu.Lock()
	defer s.feed.mu.Unlock()
	s.skipped = what
}

// LevelOf is the level of an agent's live session here; false if it has none.
func (f *Feed) LevelOf(agent string) (level uint32, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.sessions[agent]
	if s == nil || !s.live {
		return 0, false
	}
	return s.who.Level, true
}

// Older is a subscriber whose software does not understand everything.
type Older struct {
	Name    string
	Level   uint32
	TooOld  []string // what restricts and it cannot enforce
	Skipped []string // what it says that it does not know
}

// Older lists the subscribers with a stream whose level is lower than this node's, or that
// were sent something they do not know: those that cannot enforce something first, at most
// 64.
func (f *Feed) Older() []Older {
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []Older
	for _, s := range f.sessions {
		if s.live && (s.who.Level < ca.SyncLevel || len(s.tooOld) > 0 || len(s.skipped) > 0) {
			list = append(list, Older{s.who.String(), s.who.Level, s.restrictions(), s.skipped})
		}
	}
	slices.SortFunc(list, func(a, b Older) int {
		return cmp.Or(
			cmp.Compare(min(len(b.TooOld), 1), min(len(a.TooOld), 1)),
			cmp.Compare(min(len(b.Skipped), 1), min(len(a.Skipped), 1)),
			cmp.Compare(a.Level, b.Level), cmp.Compare(a.Name, b.Name))
	})
	const most = 64
	return list[:min(len(list), most)]
}
