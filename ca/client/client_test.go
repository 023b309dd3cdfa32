package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

// domain is a CA of test nodes on a network in memory. It is made inside of a
// synctest bubble, where time stands still while everybody waits.
type domain struct {
	t         *testing.T
	authority *peertest.Authority
	mu        sync.Mutex
	nodes     map[string]*node // by address
	all       []*node
}

// node is the network's edge of a CA node.
type node struct {
	ententev1.UnimplementedSyncServer
	ententev1.UnimplementedSignServer
	ententev1.UnimplementedAttestServer

	domain   *domain
	svid     *x509svid.SVID
	listener *bufconn.Listener
	server   *grpc.Server

	mu       sync.Mutex
	dialled  int
	hellos   []*ententev1.Hello
	reports  []*ententev1.InstanceReport
	acks     []uint64
	skipped  []string // as the last Ack said
	batches  []int
	shown    []string    // client certificates' serials
	ended    []time.Time // of Sync streams
	goodbyes int
	push     chan *ententev1.SyncResponse // sent to the newest stream
	begin    []*ententev1.SyncResponse    // sent at the begin of a stream
	attested func(*ententev1.AttestRequest, []byte) error
	signing  error
}

func newDomain(t *testing.T) *domain {
	return &domain{t: t, authority: peertest.NewAuthority(bank), nodes: map[string]*node{}}
}

// add starts a node named "a" at "a:1", with an SVID of the domain's or of svid.
func (d *domain) add(name string, svid ...*x509svid.SVID) *node {
	n := &node{domain: d, push: make(chan *ententev1.SyncResponse), svid: d.authority.Issue("/entente/ca/" + name)}
	if len(svid) > 0 {
		n.svid = svid[0]
	}
	n.begin = []*ententev1.SyncResponse{policyMessage(full(5, "a")), presenceMessage(serving(true))}
	d.mu.Lock()
	d.nodes[name+":1"] = n
	d.all = append(d.all, n)
	d.mu.Unlock()
	n.start()
	return n
}

// members is the member table of the domain: all nodes.
func (d *domain) members() (table []*statev1.Member) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, n := range d.all {
		id := n.svid.ID.Path()
		table = append(table, &statev1.Member{Id: peer.KeyID(n.svid.Certificates[0]), Name: id[strings.LastIndex(id, "/")+1:]})
	}
	return table
}

// of is what a node says, with the domain's member table.
func (d *domain) of(m *ententev1.SyncResponse) *ententev1.SyncResponse {
	if m.GetPolicy().GetMembersChanged() {
		m = proto.CloneOf(m)
		m.GetPolicy().Members = d.members()
	}
	return m
}

func (n *node) start() {
	config := peer.AllowClient(peer.FromSVID(n.svid), peer.SVID(n.domain.authority.Bundle(), peer.MemberOf(bank)), "h2")
	n.mu.Lock()
	defer n.mu.Unlock()
	n.listener = bufconn.Listen(1 << 16)
	n.server = grpc.NewServer(grpc.Creds(credentials.NewTLS(config)))
	ententev1.RegisterSyncServer(n.server, n)
	ententev1.RegisterSignServer(n.server, n)
	ententev1.RegisterAttestServer(n.server, n)
	go n.server.Serve(n.listener)
}

func (n *node) sessions() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.hellos)
}

func (n *node) stop() { n.server.Stop() }

func (d *domain) dial(ctx context.Context, _, address string) (net.Conn, error) {
	d.mu.Lock()
	n := d.nodes[address]
	d.mu.Unlock()
	if n == nil {
		return nil, errors.New("connection refused")
	}
	n.mu.Lock()
	n.dialled++
	listener := n.listener
	n.mu.Unlock()
	return listener.DialContext(ctx)
}

func (d *domain) stop() {
	for _, n := range d.all {
		n.stop()
	}
}

func (n *node) Sync(stream grpc.BidiStreamingServer[ententev1.SyncRequest, ententev1.SyncResponse]) error {
	state := tlsState(stream.Context())
	n.mu.Lock()
	if len(state.PeerCertificates) > 0 {
		n.shown = append(n.shown, state.PeerCertificates[0].SerialNumber.String())
	}
	n.mu.Unlock()
	defer func() {
		n.mu.Lock()
		n.ended = append(n.ended, time.Now())
		n.mu.Unlock()
	}()
	received := make(chan struct{})
	go func() {
		defer close(received)
		for first := true; ; first = false {
			message, err := stream.Recv()
			n.mu.Lock()
			if err != nil {
				if err == io.EOF {
					n.goodbyes++
				}
				n.mu.Unlock()
				return
			}
			switch m := message.GetMessage().(type) {
			case *ententev1.SyncRequest_Hello:
				n.hellos = append(n.hellos, m.Hello)
			case *ententev1.SyncRequest_Report:
				n.reports = append(n.reports, m.Report)
			case *ententev1.SyncRequest_Ack:
				n.acks = append(n.acks, m.Ack.GetRevision())
				n.skipped = m.Ack.GetSkipped()
			}
			begin := n.begin
			n.mu.Unlock()
			if first {
				for _, b := range begin {
					stream.Send(n.domain.of(b))
				}
			}
		}
	}()
	for {
		select {
		case m := <-n.push:
			if m == nil {
				return status.Error(codes.Unavailable, "the node goes")
			}
			if err := stream.Send(n.domain.of(m)); err != nil {
				return err
			}
		case <-received:
			return nil
		}
	}
}

func (n *node) SignX509(_ context.Context, request *ententev1.SignX509Request) (*ententev1.SignX509Response, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.signing != nil {
		return nil, n.signing
	}
	n.batches = append(n.batches, len(request.GetRequests()))
	answer := &ententev1.SignX509Response{}
	for _, r := range request.GetRequests() {
		result := &ententev1.X509Result{Certificates: [][]byte{[]byte(r.GetEntryId())}}
		if r.GetEntryId() == "gone" {
			result = &ententev1.X509Result{Code: uint32(codes.NotFound), Error: "no such entry"}
		}
		answer.Results = append(answer.Results, result)
	}
	return answer, nil
}

func (n *node) Attest(ctx context.Context, request *ententev1.AttestRequest) (*ententev1.AttestResponse, error) {
	state := tlsState(ctx)
	exporter, err := state.ExportKeyingMaterial(exporterLabel, nil, exporterSize)
	if err != nil {
		return nil, err
	}
	if err := n.attested(request, exporter); err != nil {
		return nil, err
	}
	return &ententev1.AttestResponse{Cluster: cluster("banking.example", 1), Certificates: [][]byte{{1}}}, nil
}

func tlsState(ctx context.Context) tls.ConnectionState {
	p, _ := grpcpeer.FromContext(ctx)
	return p.AuthInfo.(credentials.TLSInfo).State
}

func policyMessage(p *ententev1.Policy) *ententev1.SyncResponse {
	return &ententev1.SyncResponse{Message: &ententev1.SyncResponse_Policy{Policy: p}}
}

func presenceMessage(p *ententev1.Presence) *ententev1.SyncResponse {
	return &ententev1.SyncResponse{Message: &ententev1.SyncResponse_Presence{Presence: p}}
}

func heartbeat() *ententev1.SyncResponse {
	return &ententev1.SyncResponse{Message: &ententev1.SyncResponse_Heartbeat{Heartbeat: &ententev1.Heartbeat{}}}
}

// config is of a client that accepts CA nodes by their SVID.
func (d *domain) config(addresses ...string) Config {
	return Config{
		TrustDomain: bank, Addresses: addresses, Bundles: d.authority.Bundle(),
		SVID: d.authority.Issue("/entente/agent/h1"), Datacenter: "dc1", Dial: d.dial,
	}
}

// running is a client whose Sync runs.
type running struct {
	*Client
	mu      sync.Mutex
	handled []uint64
	refuse  error
	stop    func()
}

func run(t *testing.T, cfg Config) *running {
	t.Helper()
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return runClient(t, c)
}

func runClient(t *testing.T, c *Client) *running {
	t.Helper()
	r := &running{Client: c}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() {
		done <- c.Sync(ctx, func(v *View) error {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.handled = append(r.handled, v.Revision)
			return r.refuse
		})
	}()
	r.stop = func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Sync returned %v", err)
		}
	}
	return r
}

// waitFor lets virtual time go on until the condition holds, and returns how long
// that took.
func waitFor(t *testing.T, what string, most time.Duration, condition func() bool) time.Duration {
	t.Helper()
	begin := time.Now()
	for {
		synctest.Wait()
		if condition() {
			return time.Since(begin)
		}
		if time.Since(begin) > most {
			t.Fatalf("%s: not within %v", what, most)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// The nearest node is asked first; one that hangs costs 200 ms, one that refuses
// nothing.
func TestNearestFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDomain(t)
		defer d.stop()
		far, near := d.add("far"), d.add("near")
		members := []*statev1.Member{
			{Id: peer.KeyID(far.svid.Certificates[0]), ApiAddress: "far:1", Datacenter: "dc2"},
			{Id: peer.KeyID(near.svid.Certificates[0]), ApiAddress: "near:1", Datacenter: "dc1"},
		}
		cfg := d.config()
		cfg.Members = members
		connect := func() (string, time.Duration) {
			c, err := New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			conn, err := c.connect(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.close()
			return conn.address, time.Since(begin)
		}
		for range 10 {
			if address, took := connect(); address != "near:1" || took != 0 {
				t.Errorf("connected to %s after %v", address, took)
			}
		}
		far.mu.Lock()
		if far.dialled != 0 {
			t.Errorf("the far node was dialled %d times", far.dialled)
		}
		far.mu.Unlock()

		near.stop()
		near.listener = bufconn.Listen(1 << 16) // takes connections and says nothing
		if address, took := connect(); address != "far:1" || took != hedgeAfter {
			t.Errorf("hedged to %s after %v", address, took)
		}
		delete(d.nodes, "near:1")
		if address, took := connect(); address != "far:1" || took != 0 {
			t.Errorf("from a refusal to %s after %v", address, took)
		}
		delete(d.nodes, "far:1")
		c, _ := New(cfg)
		if _, err := c.connect(context.Background()); !errors.Is(err, ErrUnreachable) {
			t.Errorf("nobody there: %v", err)
		}
		time.Sleep(connectTimeout) // the hanging dial's side of the pipe
	})
}

// What one node said of the member table ends with it for who begins again without a
// picture: nodes of the last table that two agreed on are used then, and only then.
func TestDroppedNodesAreUsedWhenNoOtherIsInReach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDomain(t)
		defer d.stop()
		member := func(name string) *statev1.Member {
			return &statev1.Member{Id: peer.KeyID(d.add(name).svid.Certificates[0]), ApiAddress: name + ":1"}
		}
		liar, honest, stranger := member("liar"), member("honest"), member("stranger")
		cfg := d.config()
		cfg.Addresses = []string{"stranger:1", "honest:1"}
		cfg.Members, cfg.Confirmed = []*statev1.Member{liar}, []*statev1.Member{liar, honest}
		connect := func(except ...string) (address string, err error) {
			c, err := New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			conn, err := c.connect(t.Context(), except...)
			if err != nil {
				return "", err
			}
			defer conn.close()
			return conn.address, nil
		}
		for range 10 {
			if address, err := connect(); address != "liar:1" {
				t.Fatalf("a member is in reach: connected to %s: %v", address, err)
			}
		}
		if address, err := connect("liar:1"); address != "honest:1" {
			t.Errorf("the member answers nothing of use: connected to %q: %v", address, err)
		}
		d.mu.Lock()
		delete(d.nodes, "liar:1")
		d.mu.Unlock()
		for range 10 {
			if address, err := connect(); address != "honest:1" {
				t.Fatalf("the member is gone: connected to %q: %v", address, err)
			}
		}
		if _, err := connect("honest:1"); !errors.Is(err, ErrUnreachable) {
			t.Errorf("control: %s is of no table: %v", stranger.GetApiAddress(), err)
		}

		// With a picture there is something to compare, and the nodes are asked first.
		c, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		c.store.attach(liar.GetId())
		p := full(5, "a")
		p.Members = []*statev1.Member{liar}
		if err := c.store.policy(p); err != nil {
			t.Fatal(err)
		}
		if _, err := c.connect(t.Context()); !errors.Is(err, ErrUnreachable) {
			t.Errorf("with a picture: %v", err)
		}
	})
}

// Only CA nodes of the own domain are accepted, each refusal beside its control.
func TestAcceptsOnlyCANodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDomain(t)
		defer d.stop()
		rogue := peertest.NewAuthority(bank) // another authority with the domain's name
		good := d.add("good")
		other := d.add("other", rogue.Issue("/entente/ca/other"))
		d.add("service", d.authority.Issue("/accounts"))
		d.add("agent", d.authority.Issue("/entente/agent/h2"))
		d.add("deep", d.authority.Issue("/entente/ca/a/b"))
		d.add("gone", d.authority.Issue("/entente/ca/gone", peertest.TTL(-time.Minute)))

		pin := func(svids ...*x509svid.SVID) func(string) bool {
			return func(keyID string) bool {
				for _, svid := range svids {
					if peer.KeyID(svid.Certificates[0]) == keyID {
						return true
					}
				}
				return false
			}
		}
		keyOf := func(svid *x509svid.SVID, name string) []*statev1.Member {
			return []*statev1.Member{{Id: peer.KeyID(svid.Certificates[0]), Name: name, ApiAddress: "other:1"}}
		}
		member := keyOf(other.svid, "other")
		tests := []struct {
			name    string
			address string
			change  func(*Config)
			ok      bool
		}{
			{"by SVID", "good:1", nil, true},
			{"by pin, without a bundle", "good:1", func(c *Config) { c.Bundles, c.Pins = nil, pin(good.svid) }, true},
			{"by pin, whatever its certificate", "other:1", func(c *Config) { c.Pins = pin(other.svid) }, true},
			{"by the member table", "other:1", func(c *Config) { c.Members = member }, true},

			{"signed by another authority", "other:1", nil, false},
			{"a service", "service:1", nil, false},
			{"an agent", "agent:1", nil, false},
			{"a path below a node's", "deep:1", nil, false},
			{"ended", "gone:1", nil, false},
			{"another key than the pin", "good:1", func(c *Config) { c.Bundles, c.Pins = nil, pin(other.svid) }, false},
			{"a member's key, by SVID", "good:1", func(c *Config) { c.Members = keyOf(good.svid, "good") }, true},
			{"no member's key, whoever signed its SVID", "good:1", func(c *Config) { c.Members = keyOf(other.svid, "other") }, false},
			{"a member's name, with another key", "good:1", func(c *Config) { c.Members = keyOf(other.svid, "good") }, false},
			{"pins after the member table is known", "good:1", func(c *Config) { c.Bundles, c.Pins, c.Members = nil, pin(good.svid), member }, false},
		}
		for _, test := range tests {
			cfg := d.config(test.address)
			if test.change != nil {
				test.change(&cfg)
			}
			c, err := New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			conn, err := c.dialAs(context.Background(), test.address, true, c.acceptsNode)
			if err == nil {
				conn.close()
			}
			if (err == nil) != test.ok {
				t.Errorf("%s: %v", test.name, err)
			}
		}
	})
}

// A node that was removed is left as soon as that is known, and not believed again, although
// its authority still stands in the bundle: it signs what name it likes, also another
// node's. The other node, whose key is a member's, is believed.
func TestRemovedNodeIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDomain(t)
		defer d.stop()
		removed, stays := d.add("a"), d.add("b")
		defer func() { removed.stop() }()
		stays.begin = []*ententev1.SyncResponse{presenceMessage(serving(true))}
		at := func(address string, n *node) {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.nodes[address] = n
		}
		at("b:1", nil)
		r := run(t, d.config("a:1", "b:1"))
		defer r.stop()
		waitFor(t, "first picture", 5*time.Second, func() bool { return r.View().Revision == 5 && removed.sessions() == 1 })
		at("b:1", stays)

		removed.push <- policyMessage(&ententev1.Policy{Last: true, Revision: 6, MembersChanged: true})
		synctest.Wait()
		if removed.sessions() != 1 || stays.sessions() != 0 {
			t.Fatal("control: it is left although it is a member")
		}
		d.mu.Lock()
		d.all = d.all[1:]
		d.mu.Unlock()
		removed.push <- policyMessage(&ententev1.Policy{Last: true, Revision: 7, MembersChanged: true})
		waitFor(t, "with the node that stays", 5*time.Second, func() bool { return stays.sessions() == 1 })

		// Under the other node's name and address, with its own key.
		at("b:1", removed)
		removed.stop()
		removed.svid = d.authority.Issue("/entente/ca/b")
		removed.start()
		stays.stop()
		time.Sleep(time.Minute)
		if removed.sessions() != 1 {
			t.Error("a removed node is believed under a member's name")
		}
		stays.start()
		at("b:1", stays)
		waitFor(t, "control: the member is believed again", 5*time.Second, func() bool { return stays.sessions() == 2 })
	})
}

// A node is killed: the client is with another one within a second, asks for all that it
// holds, and says again what its host serves and, with that state, what it has applied.
func TestSyncResumesElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDomain(t)
		defer d.stop()
		a := d.add("a")
		r := run(t, d.config("a:1", "b:1"))
		defer r.stop()
		mine := []Instance{{Service: "accounts", Datacenter: "dc1", Address: "h1:1", Healthy: true}}
		waitFor(t, "first picture", time.Second, func() bool { return r.View().Revision == 5 })
		r.Report(mine)
		b := d.add("b")
		b.begin = []*ententev1.SyncResponse{presenceMessage(serving(true)), policyMessage(full(6, "a", "b"))}
		a.push <- policyMessage(&ententev1.Policy{Last: true, Revision: 6, Entries: entries("b"), MembersChanged: true})
		waitFor(t, "report and acknowledgement", 0, func() bool {
			a.mu.Lock()
			defer a.mu.Unlock()
			return len(a.reports) == 1 && len(a.acks) > 0 && a.acks[len(a.acks)-1] == 6
		})
		if a.hellos[0].GetResumeRevision() != 0 || a.hellos[0].GetConnect() != 1 || a.hellos[0].GetBootId() == "" {
			t.Errorf("first hello: %v", a.hellos[0])
		}

		a.stop()
		took := waitFor(t, "reconnect", time.Second, func() bool {
			b.mu.Lock()
			defer b.mu.Unlock()
			return len(b.hellos) == 1 && len(b.reports) == 1 && len(b.acks) == 2
		})
		t.Logf("with another node after %v", took)
		hello := b.hellos[0]
		if hello.GetResumeRevision() != 0 || hello.GetConnect() != 2 || hello.GetBootId() != a.hellos[0].GetBootId() {
			t.Errorf("hello: %v", hello)
		}
		if got := b.reports[0].GetInstances(); len(got) != 1 || got[0].GetService() != "accounts" || got[0].GetHealth() != ententev1.Health_HEALTH_HEALTHY {
			t.Errorf("report: %v", got)
		}
		if b.acks[0] != 0 || b.acks[1] != 6 || held(r.store) != "a b" {
			t.Errorf("acknowledged %v, holds %q", b.acks, held(r.store))
		}
	})
}

// Who leaves says so.
func TestGoodbye(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDomain(t)
		defer d.stop()
		a := d.add("a")
		r := run(t, d.config("a:1"))
		waitFor(t, "first", time.Second, func() bool { return r.View().Revision == 5 })
		begin := time.Now()
		r.stop()
		synctest.Wait()
		if a.goodbyes != 1 || time.Since(begin) >= leaveTime {
			t.Errorf("%d goodbyes, after %v", a.goodbyes, time.Since(begin))
		}
	})
}

// Nothing is acknowledged before the handler has applied it.
func TestAcknowledgesWhatIsApplied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDomain(t)
		defer d.stop()
		a := d.add("a")
		r := run(t, d.config("a:1"))
		defer r.stop()
		waitFor(t, "first", time.Second, func() bool { return r.View().Revision == 5 })
		r.mu.Lock()
		r.refuse = errors.New("cannot compile")
		r.mu.Unlock()
		a.push <- policyMessage(&ententev1.Policy{Last: true, Revision: 6})
		time.Sleep(time.Minute)
		r.mu.Lock()
		r.refuse = nil
		r.mu.Unlock()
		a.push <- policyMessage(&ententev1.Policy{Last: true, Revision: 7})
		synctest.Wait()
		if got := fmt.Sprint(a.acks); got != "[5 7]" {
			t.Errorf("acknowledged %s", got)
		}
		if got := fmt.Sprint(r.handled); got != "[5 6 7]" {
			t.Errorf("handled %s", got)
		}
	})
}

// Without any CA node everything stays, which is said once; instances count as
// stale after a while, and all is well again when a node is back.
func TestNobodyReachable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDomain(t)
		defer d.stop()
		a := d.add("a")
		a.begin[1] = presenceMessage(serving(true, "accounts"))
		var log bytes.Buffer
		cfg := d.config("a:1")
		cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
		r := run(t, cfg)
		waitFor(t, "first", time.Second, func() bool { return served(r.store) == "accounts" })
		a.stop()
		time.Sleep(disownAfter - 100*time.Millisecond)
		if served(r.store) != "accounts" {
			t.Errorf("a moment without a session: %q", served(r.store))
		}
		time.Sleep(10 * time.Minute)
		if served(r.store) != "accounts?" || held(r.store) != "a" {
			t.Errorf("after minutes: %q, entries %q", served(r.store), held(r.store))
		}
		a.start()
		took := waitFor(t, "back", backoffMost, func() bool { return served(r.store) == "accounts" })
		t.Logf("back after %v", took)
		r.stop()
		if n := strings.Count(log.String(), "no connection to the CA"); n != 1 {
			t.Errorf("said %d times:\n%s", n, log.String())
		}
		if n := strings.Count(log.String(), "connected to the CA"); n != 2 {
			t.Errorf("connections said %d times:\n%s", n, log.String())
		}
	})
}

// A node that lies or is of an ended epoch is left for another one.
func TestLeavesALyingNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDomain(t)
		defer d.stop()
		liar := d.add("liar")
		liar.begin = []*ententev1.SyncResponse{policyMessage(&ententev1.Policy{Full: true, Last: true, Revision: 9,
			Cluster: cluster("trading.example", 1), Bundles: ownBundle(), Entries: entries("lie")})}
		r := run(t, d.config("liar:1"))
		defer r.stop()
		time.Sleep(time.Minute)
		if r.View().Revision != 0 {
			t.Fatalf("took %v", r.View())
		}
		d.add("good")
		r.mu.Lock()
		r.cfg.Addresses = append(r.cfg.Addresses, "good:1")
		r.mu.Unlock()
		waitFor(t, "the good node", 2*backoffMost, func() bool { return held(r.store) == "a" })
	})
}

// A node that asks for more than a delta gets a session that resumes at nothing.
func TestAsksForTheFullState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDomain(t)
		defer d.stop()
		a := d.add("a")
		r := run(t, d.config("a:1"))
		defer r.stop()
		waitFor(t, "first", time.Second, func() bool { return r.View().Revision == 5 })
		a.mu.Lock()
		a.begin = []*ententev1.SyncResponse{policyMessage(full(epoch1+3, "recovered"))}
		a.mu.Unlock()
		a.push <- policyMessage(&ententev1.Policy{Last: true, Revision: epoch1 + 2, Entries: entries("b")})
		waitFor(t, "full state", time.Second, func() bool { return held(r.store) == "recovered" })
		if last := a.hellos[len(a.hellos)-1]; last.GetResumeRevision() != 0 {
			t.Errorf("hello: %v", last)
		}
	})
}

// A renewed SVID is shown on a new connection before the old one ends.
func TestMovesToTheRenewedSVID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDomain(t)
		defer d.stop()
		a := d.add("a")
		source := &swapSource{svid: d.authority.Issue("/entente/agent/h1", peertest.TTL(16*time.Second))}
		cfg := d.config("a:1")
		cfg.SVID = source
		r := run(t, cfg)
		defer r.stop()
		waitFor(t, "first", time.Second, func() bool { return r.View().Revision == 5 })
		time.Sleep(6 * time.Second)
		if a.sessions() != 1 {
			t.Fatalf("%d sessions before the renewal", a.sessions())
		}
		next := d.authority.Issue("/entente/agent/h1")
		source.set(next)
		renewed := time.Now()
		waitFor(t, "the second session", 4*time.Second, func() bool {
			a.mu.Lock()
			defer a.mu.Unlock()
			return len(a.hellos) == 2
		})
		begun := time.Now()
		if a.hellos[1].GetConnect() != 2 || a.shown[1] != next.Certificates[0].SerialNumber.String() {
			t.Errorf("second session: %v shows %s", a.hellos[1], a.shown[1])
		}
		waitFor(t, "the end of the first", 2*overlap, func() bool {
			a.mu.Lock()
			defer a.mu.Unlock()
			return len(a.ended) == 1
		})
		if !a.ended[0].After(begun) {
			t.Error("the first session ended before the second began")
		}
		t.Logf("moved %v after the renewal", begun.Sub(renewed))
		a.push <- policyMessage(&ententev1.Policy{Last: true, Revision: 6, Entries: entries("b")})
		waitFor(t, "updates go on", time.Second, func() bool { return held(r.store) == "a b" })
	})
}

type swapSource struct {
	mu   sync.Mutex
	svid *x509svid.SVID
}

func (s *swapSource) GetX509SVID() (*x509svid.SVID, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.svid, nil
}

func (s *swapSource) set(svid *x509svid.SVID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.svid = svid
}

// A node that beat and then falls silent is left; one that never beats is not.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDomain(t)
		defer d.stop()
		a := d.add("a")
		r := run(t, d.config("a:1"))
		defer r.stop()
		waitFor(t, "first", time.Second, func() bool { return r.View().Revision == 5 })
		time.Sleep(30 * time.Minute)
		if a.sessions() != 1 {
			t.Errorf("%d sessions with a node without heartbeats", a.sessions())
		}
		a.push <- heartbeat()
		time.Sleep(silenceLimit - time.Second)
		if a.sessions() != 1 {
			t.Error("left too early")
		}
		time.Sleep(2 * time.Second)
		if a.sessions() != 2 {
			t.Error("not left")
		}
	})
}

// The proof that a node gets names the exporter of that very connection.
func TestAttest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDomain(t)
		defer d.stop()
		cfg := d.config("a:1", "b:1")
		cfg.SVID = nil
		bound := func(request *ententev1.AttestRequest, exporter []byte) error {
			if !bytes.Equal(request.GetStatement(), exporter) || request.GetTokenId() != "id" || string(request.GetCsr()) != "csr" {
				return status.Error(codes.PermissionDenied, "not bound to this connection")
			}
			return nil
		}
		prove := func(exporter []byte) (*ententev1.AttestRequest, error) {
			return &ententev1.AttestRequest{TokenId: "id", Statement: exporter}, nil
		}
		var replayed []byte
		replay := func(exporter []byte) (*ententev1.AttestRequest, error) {
			if replayed == nil {
				replayed = exporter
			}
			return &ententev1.AttestRequest{TokenId: "id", Statement: replayed}, nil
		}
		a, b := d.add("a"), d.add("b")
		a.attested, b.attested = bound, bound
		if answer, err := Attest(context.Background(), cfg, prove, []byte("csr")); err != nil || len(answer.Certificates) != 1 {
			t.Errorf("control: %v", err)
		}
		if _, err := Attest(context.Background(), cfg, replay, []byte("csr")); err != nil {
			t.Errorf("control: first use: %v", err)
		}
		if _, err := Attest(context.Background(), cfg, replay, []byte("csr")); !errors.Is(err, ErrDenied) {
			t.Errorf("a proof on another connection: %v", err)
		}

		// One node cannot, the other can.
		a.attested = func(*ententev1.AttestRequest, []byte) error { return status.Error(codes.Unavailable, "no quorum") }
		for range 5 {
			if _, err := Attest(context.Background(), cfg, prove, []byte("csr")); err != nil {
				t.Errorf("with one node of two: %v", err)
			}
		}
		b.attested = a.attested
		if _, err := Attest(context.Background(), cfg, prove, []byte("csr")); !errors.Is(err, ErrUnreachable) || errors.Is(err, ErrDenied) {
			t.Errorf("with none: %v", err)
		}
		if _, err := Attest(context.Background(), cfg, func([]byte) (*ententev1.AttestRequest, error) { return &ententev1.AttestRequest{}, io.ErrUnexpectedEOF }, nil); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("no proof: %v", err)
		}
	})
}

func TestSignX509(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDomain(t)
		defer d.stop()
		a, b := d.add("a"), d.add("b")
		r := run(t, d.config("a:1", "b:1"))
		defer r.stop()
		waitFor(t, "first", time.Second, func() bool { return r.View().Revision == 5 })
		a.mu.Lock()
		b.mu.Lock()
		dialled := a.dialled + b.dialled
		b.mu.Unlock()
		a.mu.Unlock()

		var requests []SignRequest
		for i := range 250 {
			requests = append(requests, SignRequest{EntryID: fmt.Sprint("e", i)})
		}
		requests[7].EntryID = "gone"
		check := func() {
			t.Helper()
			results := r.SignX509(context.Background(), requests)
			for i, result := range results {
				switch {
				case i == 7:
					if !errors.Is(result.Err, ErrDenied) {
						t.Errorf("an entry that is gone: %v", result.Err)
					}
				case result.Err != nil || string(result.Certificates[0]) != requests[i].EntryID:
					t.Fatalf("%s: %q %v", requests[i].EntryID, result.Certificates, result.Err)
				}
			}
		}
		check()
		if got := fmt.Sprint(append(a.batches, b.batches...)); got != "[100 100 50]" {
			t.Errorf("batches %s", got)
		}
		if a.dialled+b.dialled != dialled {
			t.Error("Sync's connection was not used")
		}

		a.mu.Lock()
		a.signing = status.Error(codes.Unavailable, "no active authority")
		a.mu.Unlock()
		check() // the other node signs, whichever Sync is connected to
		b.mu.Lock()
		b.signing = a.signing
		b.mu.Unlock()
		if err := r.SignX509(context.Background(), requests[:1])[0].Err; !errors.Is(err, ErrUnreachable) {
			t.Errorf("nobody signs: %v", err)
		}
	})
}

func TestBackoff(t *testing.T) {
	s := &syncer{}
	if wait := s.backoff(); wait != 0 {
		t.Errorf("the first retry waits %v", wait)
	}
	for range 100 {
		if wait := s.backoff(); wait <= 0 || wait > backoffMost {
			t.Fatalf("waits %v", wait)
		}
	}
}

func TestNewRefusesNothingToDial(t *testing.T) {
	if _, err := New(Config{TrustDomain: bank}); err == nil {
		t.Error("a client without an address was made")
	}
	if _, err := New(Config{Addresses: []string{"a:1"}}); err == nil {
		t.Error("a client without a trust domain was made")
	}
}
