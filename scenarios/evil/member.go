// Package evil is a CA node in an attacker's hands, for tests: the real node, which
// agrees, signs and serves as it should, and lies in one thing. Each Lie names the
// promise that it attacks. In one process a test takes a node of package catest with
// Take; with real processes it starts its own test binary again, by Orders and Main, on the
// configuration and the data directory of a node that it has ended. Nothing of this is
// in the product's binary.
//
// What can be said with a node's key alone, whether the node runs or not, are methods
// of Member: Propose in an operator's name, and Raft with Voice.
package evil

import (
	"context"
	"crypto/tls"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/keystore"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/ca/server"
	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

// Member is what an attacker who was on a CA node's host has: its node key, and so its
// place in the cluster. Methods may be called concurrently.
type Member struct {
	ID   string // the node id
	Name string
	// Root is an authority of the attacker's, of the domain's name. Nobody agreed to it.
	Root *peertest.Authority

	certificate tls.Certificate

	mu       sync.Mutex
	said     saying                               // what the node says beside the truth
	sessions map[string]string                    // of the domain's agents, as the members say: boot ids by agent
	bundle   []byte                               // the own bundle of when the first lie needed it
	pictures map[string][]*ententev1.SyncResponse // what each subscriber heard first
	flooded  int

	running atomic.Pointer[node.Node]
}

// saying is one Tell.
type saying struct {
	lies  []Lie
	count int
}

// Open reads the key of a node from its data directory, where it lies unsealed. The
// node may run or not.
func Open(cfg *node.Config) (*Member, error) {
	keys, err := keystore.Open(filepath.Join(cfg.DataDir, "keys"), keystore.Plain())
	if err != nil {
		return nil, err
	}
	key, err := keys.Load("node")
	if err != nil {
		return nil, err
	}
	cert, err := peer.SelfSigned(key, cfg.Name)
	if err != nil {
		return nil, err
	}
	td, err := spiffeid.TrustDomainFromString(cfg.TrustDomain)
	if err != nil {
		return nil, err
	}
	return &Member{
		ID: peer.KeyID(cert.Leaf), Name: cfg.Name, certificate: cert,
		Root:     peertest.NewAuthority(td),
		sessions: make(map[string]string), pictures: make(map[string][]*ententev1.SyncResponse),
	}, nil
}

// Take takes over a running node of a test, until the test ends: it is restarted, with
// the same key, state and addresses, and says what it is told to. It tells the truth
// until then.
func Take(t testing.TB, c *catest.CA) *Member {
	t.Helper()
	m, err := Open(c.Config())
	if err != nil {
		t.Fatal(err)
	}
	c.Between(m.between())
	c.Restart()
	c.WaitReady()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.attend(ctx, c.Node())
	}()
	t.Cleanup(func() { cancel(); <-done })
	return m
}

// Tell has the node lie from now on; without lies it tells the truth again. Who has a
// stream open hears it with the next message, within a heartbeat: the own bundle and the
// members are said once more.
func (m *Member) Tell(lies ...Lie) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.said = saying{lies, m.said.count + 1}
	m.bundle = nil
	clear(m.pictures)
}

func (m *Member) saying() saying {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.said
}

// Sessions are the agents and gateways of the domain that the other members know, with
// their boot ids.
func (m *Member) Sessions() map[string]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.sessions)
}

// Record is this member as the state has it.
func (m *Member) Record() (own *statev1.Member) {
	if n := m.running.Load(); n != nil {
		n.Read(func(st *domain.State) { own, _ = st.Member(m.ID) })
	}
	return own
}

// attend follows what the other members say of sessions, while the node runs.
func (m *Member) attend(ctx context.Context, n *node.Node) {
	m.running.Store(n)
	var listeners sync.WaitGroup
	defer listeners.Wait()
	listening := make(map[string]bool)
	for ctx.Err() == nil {
		n.Read(func(st *domain.State) {
			for _, other := range st.Members() {
				if other.GetId() != m.ID && !listening[other.GetId()] {
					listening[other.GetId()] = true
					listeners.Go(func() { m.listen(ctx, other.GetApiAddress()) })
				}
			}
		})
		wait(ctx, time.Second)
	}
}

func (m *Member) listen(ctx context.Context, address string) {
	conn, err := m.Dial(address)
	if err != nil {
		return
	}
	defer conn.Close()
	for ctx.Err() == nil {
		stream, err := ententev1.NewPeerClient(conn).Presence(ctx, &ententev1.PresenceRequest{})
		for err == nil {
			var said *ententev1.PresenceResponse
			if said, err = stream.Recv(); err == nil {
				m.mu.Lock()
				for _, i := range said.GetInstances() {
					if i.GetService() == "" { // the session itself
						m.sessions[i.GetAgent()] = i.GetBootId()
					}
				}
				m.mu.Unlock()
			}
		}
		wait(ctx, 200*time.Millisecond)
	}
}

func wait(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// Dial connects to another CA node's API as this member. It takes whatever answers.
func (m *Member) Dial(address string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+address, grpc.WithNoProxy(), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, Certificates: []tls.Certificate{m.certificate}, NextProtos: []string{"h2"},
	})))
}

// Propose hands a command to whichever of the addresses leads, as asked by actor: an
// operator's name for what no operator asked. It attacks the agreement on who counts,
// and every rule about what operators alone may do.
func (m *Member) Propose(ctx context.Context, addresses []string, actor string, command *statev1.Command) (*ententev1.ProposeResponse, error) {
	command = proto.CloneOf(command)
	command.Actor = actor
	data, err := proto.Marshal(command)
	if err != nil {
		return nil, err
	}
	err = fmt.Errorf("no address was given")
	for _, address := range addresses {
		conn, dialled := m.Dial(address)
		if dialled != nil {
			return nil, dialled
		}
		var resp *ententev1.ProposeResponse
		resp, err = ententev1.NewPeerClient(conn).Propose(ctx, &ententev1.ProposeRequest{Command: data})
		conn.Close()
		if status.Code(err) != codes.FailedPrecondition { // it leads
			return resp, err
		}
	}
	return nil, err
}

// between is where the node's words are exchanged.
func (m *Member) between() server.Between {
	unary := func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		if slices.ContainsFunc(m.saying().lies, func(l Lie) bool { return l.Deaf == info.FullMethod }) {
			return nil, status.Error(codes.Unavailable, "this CA node does not hear that")
		}
		return handler(ctx, req)
	}
	return server.Between{Unary: unary, Stream: func(srv any, inner grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		s := &stream{ServerStream: inner, member: m, subscriber: subscriber(inner.Context()), said: m.saying()}
		s.begin()
		if info.FullMethod != ententev1.Peer_Presence_FullMethodName {
			return handler(srv, s)
		}
		ctx, cancel := context.WithCancel(inner.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.claim(ctx)
		}()
		defer func() { cancel(); <-done }()
		return handler(srv, s)
	}}
}

// stream is what one subscriber or member hears.
type stream struct {
	grpc.ServerStream
	member     *Member
	subscriber string

	mu       sync.Mutex
	said     saying
	lies     []func(*ententev1.SyncResponse) []*ententev1.SyncResponse
	bundle   *ententev1.Bundle // the own one, as it is
	members  []*statev1.Member
	revision uint64
}

// begin makes what this stream hears of the lies of now.
func (s *stream) begin() {
	s.lies = nil
	for _, lie := range s.said.lies {
		if lie.Sync != nil {
			s.lies = append(s.lies, lie.Sync(s.member, s.subscriber))
		}
	}
}

// SendMsg sends lies for truths.
func (s *stream) SendMsg(message any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	truth, ok := message.(*ententev1.SyncResponse)
	if !ok {
		return s.ServerStream.SendMsg(message)
	}
	if now := s.member.saying(); now.count != s.said.count {
		s.said = now
		s.begin()
		if s.revision != 0 {
			if err := s.say(s.again()); err != nil {
				return err
			}
		}
	}
	s.note(truth.GetPolicy())
	return s.say(truth)
}

// note keeps what again says.
func (s *stream) note(p *ententev1.Policy) {
	for _, b := range p.GetBundles() {
		if b.GetTrustDomain() == s.member.Root.TrustDomain().Name() {
			s.bundle = b
		}
	}
	if p.GetMembersChanged() {
		s.members = p.GetMembers()
	}
	s.revision = max(s.revision, p.GetRevision())
}

// again is a change that changes nothing.
func (s *stream) again() *ententev1.SyncResponse {
	p := &ententev1.Policy{Last: true, Revision: s.revision, Members: s.members, MembersChanged: s.members != nil}
	if s.bundle != nil {
		p.Bundles = []*ententev1.Bundle{s.bundle}
	}
	return &ententev1.SyncResponse{Message: &ententev1.SyncResponse_Policy{Policy: p}}
}

func (s *stream) say(truth *ententev1.SyncResponse) error {
	said := []*ententev1.SyncResponse{proto.CloneOf(truth)} // others get the same records
	for _, lie := range s.lies {
		var next []*ententev1.SyncResponse
		for _, one := range said {
			next = append(next, lie(one)...)
		}
		said = next
	}
	for _, one := range said {
		if err := s.ServerStream.SendMsg(one); err != nil {
			return err
		}
	}
	return nil
}

// RecvMsg keeps from the real node what would show it the lie.
func (s *stream) RecvMsg(message any) error {
	err := s.ServerStream.RecvMsg(message)
	if request, ok := message.(*ententev1.SyncRequest); ok && err == nil {
		for _, lie := range s.member.saying().lies {
			if lie.Heard != nil {
				lie.Heard(request)
			}
		}
	}
	return err
}

// claim sends false presence beside the true one.
func (s *stream) claim(ctx context.Context) {
	for wait(ctx, claimEvery); ctx.Err() == nil; wait(ctx, claimEvery) {
		for _, lie := range s.member.saying().lies {
			if lie.Presence == nil {
				continue
			}
			said := lie.Presence(s.member)
			s.mu.Lock()
			s.ServerStream.SendMsg(said) // a stream that has ended is the handler's to notice
			s.mu.Unlock()
		}
	}
}

const claimEvery = 100 * time.Millisecond
