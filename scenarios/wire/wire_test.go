// Package wire holds this release to what the releases before it say: agents and CA
// nodes of both work together. testdata has a level for each, recorded from its own
// code, with the descriptors of its messages.
//
// `buf breaking` in .ci/run compares descriptors; the tests here see what is said.
package wire

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/domain"
)

type kinds struct{ requests, responses map[string]bool }

// kindsOf are the messages of some services, by full name.
func kindsOf(services ...protoreflect.Name) kinds {
	k := kinds{map[string]bool{}, map[string]bool{}}
	for _, name := range services {
		methods := ententev1.File_entente_v1_entente_proto.Services().ByName(name).Methods()
		for i := range methods.Len() {
			k.requests[string(methods.Get(i).Input().FullName())] = true
			k.responses[string(methods.Get(i).Output().FullName())] = true
		}
	}
	return k
}

var (
	processes = kindsOf("Join", "Attest", "Sync", "Sign", "Peer") // between processes; people's tools are of one release with the node they ask
	agents    = kindsOf("Attest", "Sync", "Sign")
)

// level is what one release said, and how it understands.
type level struct {
	name     string
	files    *protoregistry.Files
	messages []recorded
}

type recorded struct {
	name    string
	encoded []byte
}

func levels(t *testing.T) (list []*level) {
	t.Helper()
	dirs, err := filepath.Glob("testdata/*")
	if err != nil || len(dirs) == 0 {
		t.Fatal(dirs, err)
	}
	for _, dir := range dirs {
		l := &level{name: filepath.Base(dir), files: files(t, descriptors(t, dir))}
		f, err := os.Open(filepath.Join(dir, messagesFile))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		lines := bufio.NewScanner(f)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			name, text, _ := strings.Cut(lines.Text(), " ")
			encoded, err := base64.StdEncoding.DecodeString(text)
			if err != nil {
				t.Fatal(err)
			}
			l.messages = append(l.messages, recorded{name, encoded})
		}
		if lines.Err() != nil || len(l.messages) < 20 {
			t.Fatalf("%s: %d messages, %v", dir, len(l.messages), lines.Err())
		}
		list = append(list, l)
	}
	return list
}

func descriptors(t *testing.T, dir string) *descriptorpb.FileDescriptorSet {
	t.Helper()
	encoded, err := os.ReadFile(filepath.Join(dir, descriptorFile))
	if err != nil {
		t.Fatal(err)
	}
	set := &descriptorpb.FileDescriptorSet{}
	if err := proto.Unmarshal(encoded, set); err != nil {
		t.Fatal(err)
	}
	return set
}

func files(t *testing.T, set *descriptorpb.FileDescriptorSet) *protoregistry.Files {
	t.Helper()
	f, err := protodesc.NewFiles(set)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// empty is a message as the level has it; nil if it has none of that name.
func (l *level) empty(name string) *dynamicpb.Message {
	d, err := l.files.FindDescriptorByName(protoreflect.FullName(name))
	if err != nil {
		return nil
	}
	return dynamicpb.NewMessage(d.(protoreflect.MessageDescriptor))
}

// read decodes as the level does.
func (l *level) read(r recorded) (proto.Message, error) {
	m := l.empty(r.name)
	return m, proto.Unmarshal(r.encoded, m)
}

// today decodes as this release does.
func today(r recorded) (proto.Message, error) {
	kind, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName(r.name))
	if err != nil {
		return nil, err
	}
	m := kind.New().Interface()
	return m, proto.Unmarshal(r.encoded, m)
}

// meaning says what a message holds by numbers and kinds of fields; names are no promise.
func meaning(m protoreflect.Message) string {
	var fields []protoreflect.FieldDescriptor
	m.Range(func(f protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		fields = append(fields, f)
		return true
	})
	slices.SortFunc(fields, func(a, b protoreflect.FieldDescriptor) int { return int(a.Number() - b.Number()) })
	var b strings.Builder
	one := func(f protoreflect.FieldDescriptor, v protoreflect.Value) {
		switch f.Kind() {
		case protoreflect.MessageKind, protoreflect.GroupKind:
			b.WriteString("{" + meaning(v.Message()) + "}")
		case protoreflect.EnumKind:
			fmt.Fprintf(&b, " enum %d", v.Enum())
		default:
			fmt.Fprintf(&b, " %v %q", f.Kind(), fmt.Sprint(v.Interface()))
		}
	}
	for _, f := range fields {
		fmt.Fprintf(&b, " %d:", f.Number())
		switch v := m.Get(f); {
		case f.IsList():
			for i := range v.List().Len() {
				one(f, v.List().Get(i))
			}
		case f.IsMap():
			panic("no message has a map: say how its meaning is told")
		default:
			one(f, v)
		}
	}
	if unknown := m.GetUnknown(); len(unknown) > 0 {
		fmt.Fprintf(&b, " unknown %x", []byte(unknown))
	}
	return b.String()
}

// What a release before said means to this one what it meant to itself.
func TestMeaning(t *testing.T) {
	for _, l := range levels(t) {
		kinds := map[string]bool{}
		for _, r := range l.messages {
			kinds[r.name] = true
			then, err := l.read(r)
			if err != nil {
				t.Fatal(err)
			}
			now, err := today(r)
			if err != nil {
				t.Errorf("%s: %s cannot be read any more: %v", l.name, r.name, err)
				continue
			}
			if before, after := meaning(then.ProtoReflect()), meaning(now.ProtoReflect()); before != after {
				t.Errorf("%s: %s\nwas %s\nis  %s", l.name, r.name, before, after)
			}
		}
		for _, name := range []string{"Join", "Attest", "Sync", "SignX509"} {
			for _, end := range []string{"Request", "Response"} {
				if kind := "entente.v1." + name + end; !kinds[kind] {
					t.Errorf("%s has no %s", l.name, kind)
				}
			}
		}
	}
}

// A field that gets another number or another kind is found.
func TestMeaningNotices(t *testing.T) {
	for name, change := range map[string]func(*descriptorpb.FieldDescriptorProto){
		"another number": func(f *descriptorpb.FieldDescriptorProto) { f.Number = proto.Int32(4004) },
		"another kind": func(f *descriptorpb.FieldDescriptorProto) {
			f.Type = descriptorpb.FieldDescriptorProto_TYPE_STRING.Enum()
		},
	} {
		for _, l := range levels(t) {
			set, changed := descriptors(t, filepath.Join("testdata", l.name)), false
			for _, file := range set.GetFile() {
				for _, m := range file.GetMessageType() {
					for _, f := range m.GetField() {
						if m.GetName() == "AttestRequest" && f.GetName() == "csr" {
							change(f)
							changed = true
						}
					}
				}
			}
			other, found := &level{files: files(t, set)}, false
			for _, r := range l.messages {
				then, err := other.read(r)
				now, _ := today(r)
				if err != nil || meaning(then.ProtoReflect()) != meaning(now.ProtoReflect()) {
					found = true
					if r.name != "entente.v1.AttestRequest" {
						t.Errorf("%s: %s was not changed", name, r.name)
					}
				}
			}
			if !changed || !found {
				t.Errorf("%s in %s is not noticed", name, l.name)
			}
		}
	}
}

// TestAnswers replays what agents of before asked to a CA of this release, and reads the answers
// as they did.
func TestAnswers(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(service("accounts", ", port: 18080") + service("ledger", ""))
	dir := t.TempDir()
	t.Run("admitted", func(t *testing.T) { start(t, c, dir) })
	certificate := admitted(t, dir)
	dial := func(certificates ...tls.Certificate) *grpc.ClientConn {
		conn, err := grpc.NewClient(c.Addresses()[0], grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
			MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, Certificates: certificates, NextProtos: []string{"h2"},
		})))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	known, stranger := dial(certificate), dial()
	for _, l := range levels(t) {
		asked := map[string]int{}
		for _, r := range l.messages {
			request, err := l.read(r)
			if err != nil {
				t.Fatal(err)
			}
			call := func(conn *grpc.ClientConn, method string) (proto.Message, error) {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				answer := l.empty(strings.TrimSuffix(r.name, "Request") + "Response")
				asked[r.name]++
				return answer, conn.Invoke(ctx, method, request, answer)
			}
			switch r.name {
			case "entente.v1.AttestRequest", "entente.v1.JoinRequest": // made for another connection: understood, and refused
				verb := strings.TrimSuffix(strings.TrimPrefix(r.name, "entente.v1."), "Request")
				if _, err := call(stranger, "/entente.v1."+verb+"/"+verb); !slices.Contains([]codes.Code{codes.PermissionDenied, codes.Unauthenticated, codes.FailedPrecondition}, status.Code(err)) {
					t.Errorf("%s %s: %v", l.name, verb, err)
				}
			case "entente.v1.SignX509Request", "entente.v1.SignJWTRequest", "entente.v1.SignWITRequest":
				verb := strings.TrimSuffix(strings.TrimPrefix(r.name, "entente.v1."), "Request")
				nameRecords(c, request)
				answer, err := call(known, "/entente.v1.Sign/"+verb)
				if err != nil {
					t.Errorf("%s %s: %v", l.name, verb, err)
					continue
				}
				requests, results := list(request, 1), list(answer, 1)
				if requests.Len() == 0 || results.Len() != requests.Len() {
					t.Errorf("%s %s: %d requests, %d results", l.name, verb, requests.Len(), results.Len())
				}
				for i := range results.Len() {
					granted, own := has(results.Get(i).Message().Interface(), 1), !has(requests.Get(i).Message().Interface(), 1)
					if granted == own { // its own SVID is for its own key only, and that was another agent's
						t.Errorf("%s %s: %v", l.name, verb, results.Get(i))
					}
				}
			}
		}
		for _, name := range []string{"Attest", "Join", "SignX509"} {
			if asked["entente.v1."+name+"Request"] == 0 {
				t.Errorf("%s asks for no %s", l.name, name)
			}
		}
		l.follow(t, known)
	}
}

// nameRecords has requests that name an entry's record name that of this CA: those of when
// they were recorded were of another.
func nameRecords(c *catest.CA, request proto.Message) {
	requests := list(request, 1)
	for i := range requests.Len() {
		m := requests.Get(i).Message()
		fields := m.Descriptor().Fields()
		if record := fields.ByName("record"); record != nil && m.Has(record) {
			c.Node().Read(func(st *domain.State) {
				if entry, ok := st.Entry(m.Get(fields.ByName("entry_id")).String()); ok {
					hash := ca.RecordHash(entry)
					m.Set(record, protoreflect.ValueOfBytes(hash[:]))
					m.Set(fields.ByName("entry_revision"), protoreflect.ValueOfUint64(entry.GetRevision()))
				}
			})
		}
	}
}

// admitted is what an agent keeps: its SVID and key.
func admitted(t *testing.T, dataDir string) (own tls.Certificate) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dataDir, "agent.key"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	if own.PrivateKey, err = x509.ParsePKCS8PrivateKey(block.Bytes); err != nil {
		t.Fatal(err)
	}
	if text, err = os.ReadFile(filepath.Join(dataDir, "agent.json")); err != nil {
		t.Fatal(err)
	}
	var known struct{ Certificates [][]byte }
	if err := json.Unmarshal(text, &known); err != nil {
		t.Fatal(err)
	}
	own.Certificate = known.Certificates
	return own
}

// follow replays Sync: after a greeting of before, the whole state comes in a form that
// the level reads.
func (l *level) follow(t *testing.T, conn *grpc.ClientConn) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/entente.v1.Sync/Sync")
	if err != nil {
		t.Fatal(err)
	}
	sent := 0
	for _, hello := range []bool{true, false} {
		for _, r := range l.messages {
			request, _ := l.read(r)
			if r.name == "entente.v1.SyncRequest" && has(request, 1) == hello {
				if err := stream.SendMsg(request); err != nil {
					t.Fatal(err)
				}
				if sent++; hello {
					break
				}
			}
		}
	}
	if sent < 2 {
		t.Errorf("%s says %d things in Sync", l.name, sent)
	}
	for {
		answer := l.empty("entente.v1.SyncResponse")
		if err := stream.RecvMsg(answer); err != nil {
			t.Errorf("%s: Sync: %v", l.name, err)
			return
		}
		if policy := answer.Get(answer.Descriptor().Fields().ByNumber(1)).Message(); has(answer, 1) && has(policy.Interface(), 2) {
			if !has(policy.Interface(), 1) || list(policy.Interface(), 5).Len() != 2 || list(policy.Interface(), 7).Len() == 0 {
				t.Errorf("%s: no full state, entries or bundles: %v", l.name, policy)
			}
			return
		}
	}
}

func has(m proto.Message, number protoreflect.FieldNumber) bool {
	return m.ProtoReflect().Has(m.ProtoReflect().Descriptor().Fields().ByNumber(number))
}

func list(m proto.Message, number protoreflect.FieldNumber) protoreflect.List {
	return m.ProtoReflect().Get(m.ProtoReflect().Descriptor().Fields().ByNumber(number)).List()
}

// TestMixed has an agent and a CA work together, while everything that one side says
// goes through the eyes of a release before: what that does not know is lost. CA nodes among
// themselves have feature levels for that.
func TestMixed(t *testing.T) {
	if testing.Short() {
		t.Skip("some seconds for each level")
	}
	for _, l := range levels(t) {
		for side, names := range map[string]map[string]bool{"agent": agents.requests, "CA": agents.responses} {
			t.Run(side+" of "+l.name, func(t *testing.T) {
				var lost atomic.Int64
				through := func(m proto.Message) proto.Message {
					name := string(m.ProtoReflect().Descriptor().FullName())
					then := l.empty(name)
					if !names[name] || then == nil {
						return m
					}
					encoded, err := proto.Marshal(m)
					if err == nil {
						err = proto.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(encoded, then)
					}
					if err != nil {
						t.Errorf("%s: %v", name, err)
						return m
					}
					if proto.Size(then) < len(encoded) {
						lost.Add(1)
					}
					return then
				}
				tap.Store(&through)
				defer tap.Store(nil)
				day(t, func(*catest.CA) {})
				t.Logf("%d messages said something that %s does not know", lost.Load(), l.name)
			})
		}
	}
}
