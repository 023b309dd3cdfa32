package wire

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/meshagent"
)

// unknown is a field of a later release.
func unknown(number protowire.Number) []byte {
	return protowire.AppendString(protowire.AppendTag(nil, number, protowire.BytesType), "of a later release")
}

// newerCA makes of what a CA of this release says what one of a later release might that
// filters nothing: an object of an unknown kind in each policy chunk, unknown fields of
// services, entries and members, messages of an unknown kind between.
func newerCA(m proto.Message) proto.Message {
	response, ok := m.(*ententev1.SyncResponse)
	if !ok {
		return m
	}
	said := proto.CloneOf(response)
	switch message := said.GetMessage().(type) {
	case *ententev1.SyncResponse_Presence:
		if len(message.Presence.GetInstances())+len(message.Presence.GetWithdrawn()) == 0 && !message.Presence.GetComplete() {
			said = &ententev1.SyncResponse{}
			said.ProtoReflect().SetUnknown(unknown(9000))
		}
	case *ententev1.SyncResponse_Heartbeat:
		message.Heartbeat.ProtoReflect().SetUnknown(unknown(9001))
		said.ProtoReflect().SetUnknown(unknown(9000))
	case *ententev1.SyncResponse_Policy:
		p := message.Policy
		for _, o := range p.GetObjects() {
			if s := o.GetService(); s != nil {
				s.ProtoReflect().SetUnknown(unknown(9002))
			}
		}
		for _, member := range p.GetMembers() {
			member.ProtoReflect().SetUnknown(unknown(9003))
		}
		later := &statev1.Object{Revision: 1}
		later.ProtoReflect().SetUnknown(unknown(9004))
		p.Objects = append(p.Objects, later)
		p.ProtoReflect().SetUnknown(unknown(9005))
	}
	return said
}

// An agent of this release works with a CA of a later one: SVIDs, changes and above all
// revocations are in force, and the CA's operators see what the agent skips.
func TestNewerCA(t *testing.T) {
	for _, newer := range []bool{false, true} {
		t.Run(fmt.Sprintf("newer %v", newer), func(t *testing.T) {
			c := catest.Start(t, catest.Options{})
			c.Apply(service("accounts", ", port: 18080"))
			if newer {
				say := func(m proto.Message) proto.Message { return newerCA(m) }
				tap.Store(&say)
				defer tap.Store(nil)
			}
			agent := start(t, c, t.TempDir())
			eventually(t, "accounts", func() error {
				_, err := agent.SVIDs("service/accounts").GetX509SVID()
				return err
			})

			// A host is banned, a service goes, another one comes.
			c.Apply(service("ledger", ""))
			if _, err := attestAnother(t, c, "h2"); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Admin().BanAgent(t.Context(), &ententev1.ChangeAgentRequest{Name: "h2"}); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the ban and the new service", func() error {
				view := agent.State().View
				if view.Distrust == nil {
					return errors.New("nothing is distrusted")
				}
				if _, err := catalog.Compile(agent.Config().Domain(), view.Objects); err != nil {
					return err
				}
				_, err := agent.SVIDs("service/ledger").GetX509SVID()
				return err
			})
			eventually(t, "acknowledged", func() error {
				if s := c.Status(); s.GetAcknowledgedRevision() != s.GetRevision() {
					return fmt.Errorf("%d of %d: waits for %v", s.GetAcknowledgedRevision(), s.GetRevision(), s.GetWaitingFor())
				}
				return nil
			})
			if !newer { // control
				if s := c.Status().GetOlder(); len(s) > 0 || len(agent.State().View.Skipped) > 0 {
					t.Errorf("of one release, and %v", s)
				}
				return
			}
			eventually(t, "what is skipped is known", func() error {
				older := c.Status().GetOlder()
				if len(older) != 1 || older[0].GetName() != "agent h1" || older[0].GetLevel() != ca.SyncLevel {
					return fmt.Errorf("%v", older)
				}
				for _, want := range []string{"Object: field 9004", "Service: field 9002", "Member: field 9003", "SyncResponse: field 9000"} {
					if !slices.Contains(older[0].GetSkipped(), want) || want != "SyncResponse: field 9000" && !slices.Contains(agent.State().View.Skipped, want) {
						return fmt.Errorf("%s is not said: %v", want, older[0].GetSkipped())
					}
				}
				return nil
			})
		})
	}
}

// attestAnother has a host admitted that says nothing after that.
func attestAnother(t *testing.T, c *catest.CA, name string) (*meshagent.Agent, error) {
	t.Helper()
	cfg, err := meshagent.ReadConfig("agent.yaml", strings.NewReader(fmt.Sprintf(
		"trustDomain: banking.example\nname: %s\ndatacenter: dc1\ndataDir: %s\nca: {token: %s}\n", name, t.TempDir(), c.AgentToken(name, "dc1"))))
	if err != nil {
		return nil, err
	}
	agent, err := meshagent.New(cfg, nil)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- agent.Run(ctx) }()
	eventually(t, name, agent.Ready)
	cancel()
	return agent, <-ended
}

// A subscriber of the release before is told nothing that it does not know, is served, and
// is listed as older.
func TestOlderAgentIsListed(t *testing.T) {
	for _, l := range levels(t) {
		c := catest.Start(t, catest.Options{})
		c.Apply(service("accounts", ", port: 18080"))
		var beyond atomic.Int64
		through := func(m proto.Message) proto.Message {
			if r, ok := m.(*ententev1.SyncRequest); ok {
				then := l.empty("entente.v1.SyncRequest")
				encoded, err := proto.Marshal(r)
				if err == nil {
					err = proto.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(encoded, then)
				}
				if err != nil {
					t.Error(err)
				}
				return then
			}
			if p := asPolicy(m); p != nil {
				encoded, _ := proto.Marshal(p)
				then := l.empty("entente.v1.Policy")
				if err := proto.Unmarshal(encoded, then); err != nil {
					t.Error(err)
				}
				for _, o := range p.GetObjects() {
					old := l.empty("entente.state.v1.Object")
					b, _ := proto.Marshal(o)
					if err := proto.Unmarshal(b, old); err != nil || len(old.GetUnknown()) > 0 {
						beyond.Add(1)
					}
				}
			}
			return m
		}
		tap.Store(&through)
		agent := start(t, c, t.TempDir())
		eventually(t, "accounts", func() error {
			_, err := agent.SVIDs("service/accounts").GetX509SVID()
			return err
		})
		older := c.Status().GetOlder()
		tap.Store(nil)
		saysLevel := l.empty("entente.v1.Hello").ProtoReflect().Descriptor().Fields().ByName("level") != nil
		switch {
		case saysLevel && len(older) > 0: // it says the level that it has, which is today's
			t.Errorf("%s: %v", l.name, older)
		case !saysLevel && (len(older) != 1 || older[0].GetLevel() != 0 || older[0].GetName() != "agent h1"):
			t.Errorf("%s: %v", l.name, older)
		}
		if n := beyond.Load(); n > 0 {
			t.Errorf("%s was told %d objects of kinds that it does not know", l.name, n)
		}
	}
}

func asPolicy(m proto.Message) *ententev1.Policy {
	if r, ok := m.(*ententev1.SyncResponse); ok {
		return r.GetPolicy()
	}
	return nil
}

// A record has one hash for all releases: who does not know a field that is set writes the
// bytes that its author wrote.
func TestRecordsAreEqualInAllReleases(t *testing.T) {
	records := []proto.Message{&statev1.Cluster{}, &statev1.Member{}, &statev1.Authority{}, &statev1.Agent{}, &statev1.Entry{}, &statev1.Object{}, &statev1.Distrust{}}
	for _, l := range levels(t) {
		lost := 0
		for _, record := range records {
			fill(record.ProtoReflect())
			author := ca.AppendRecord(nil, record)
			then := l.empty(string(record.ProtoReflect().Descriptor().FullName()))
			if then == nil {
				continue
			}
			if err := proto.Unmarshal(author, then); err != nil {
				t.Fatal(err)
			}
			if got := ca.AppendRecord(nil, then); !bytes.Equal(got, author) {
				t.Errorf("%s: %s\nis  %x\nwas %x", l.name, record.ProtoReflect().Descriptor().Name(), got, author)
			}
			if len(then.GetUnknown()) > 0 {
				lost++
			}
			if changed := proto.Clone(then); true { // control
				changed.ProtoReflect().SetUnknown(append(slices.Clone(then.GetUnknown()), unknown(9000)...))
				if bytes.Equal(ca.AppendRecord(nil, changed), author) {
					t.Errorf("%s: a field more is not seen", l.name)
				}
			}
		}
		t.Logf("%s does not know some field of %d records", l.name, lost)
	}
}

// fill sets every field, deeply; of a choice the last one.
func fill(m protoreflect.Message) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		one := func() protoreflect.Value {
			switch f.Kind() {
			case protoreflect.StringKind:
				return protoreflect.ValueOfString("s")
			case protoreflect.BytesKind:
				return protoreflect.ValueOfBytes([]byte{1})
			case protoreflect.BoolKind:
				return protoreflect.ValueOfBool(true)
			case protoreflect.EnumKind:
				return protoreflect.ValueOfEnum(1)
			case protoreflect.Uint32Kind:
				return protoreflect.ValueOfUint32(300)
			case protoreflect.Uint64Kind:
				return protoreflect.ValueOfUint64(300)
			default:
				return protoreflect.ValueOfInt64(300)
			}
		}
		switch {
		case f.IsList() && f.Kind() == protoreflect.MessageKind:
			fill(m.Mutable(f).List().AppendMutable().Message())
		case f.IsList():
			m.Mutable(f).List().Append(one())
		case f.Kind() == protoreflect.MessageKind:
			fill(m.Mutable(f).Message())
		default:
			m.Set(f, one())
		}
	}
}
