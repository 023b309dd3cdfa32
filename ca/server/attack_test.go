package server_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/internal/peer"
)

// The tests of this file attack a whole node, over TLS and sockets. Beside each attack
// stands a client that means no harm, comes during it and is served.

// victim is the node, and the well-behaved host beside the attackers.
type victim struct {
	*catest.CA
	t    testing.TB
	good tls.Certificate
}

func newVictim(t testing.TB) *victim {
	t.Helper()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	v := &victim{c, t, attest(t, c, "h1")}
	v.serves("before the attack")
	return v
}

// serves says that a host that comes now is served, and how fast.
func (v *victim) serves(when string) {
	v.t.Helper()
	begin := time.Now()
	var err error
	for range 20 { // as its client does: it comes back
		if _, err = sign(v.t, dial(v.t, v.CA, &v.good), "service/accounts", newKey(v.t)); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if took := time.Since(begin); err != nil || took > 8*time.Second {
		v.t.Errorf("control: a good client %s: %v after %v", when, err, took)
	}
}

// metric reads one of the node's metrics; the name may hold labels.
func (v *victim) metric(name string) float64 {
	v.t.Helper()
	resp, err := http.Get("http://" + v.Node().AdminAddr() + "/metrics")
	if err != nil {
		v.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		v.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, name+" "); ok {
			value, err := strconv.ParseFloat(strings.TrimSpace(rest), 64)
			if err != nil {
				v.t.Fatal(err)
			}
			return value
		}
	}
	v.t.Fatalf("no metric %s", name)
	return 0
}

// raw opens a connection and speaks what is below gRPC; certificate may be nil.
func (v *victim) raw(cert *tls.Certificate) *tls.Conn {
	v.t.Helper()
	config := &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, NextProtos: []string{"h2"}}
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	conn, err := tls.Dial("tcp", v.Config().Listen.API, config)
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { conn.NetConn().Close() })
	return conn
}

// ends says that the node ends a connection that does not go on.
func (v *victim) ends(what string, conn net.Conn, within time.Duration) {
	v.t.Helper()
	conn.SetReadDeadline(time.Now().Add(within))
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
		v.t.Errorf("%s: still open after %v", what, within)
	}
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}

// What a client may say, and must not be given.
func TestMaliciousRequests(t *testing.T) {
	t.Parallel()
	v := newVictim(t)
	conn := dial(t, v.CA, &v.good)

	t.Run("requests", func(t *testing.T) {
		_, err := sign(t, conn, "service/ledger", newKey(t))
		wantCode(t, "someone else's entry", err, codes.PermissionDenied)
		// The key of one request under the signature of another.
		csr, other := csrOf(t, newKey(t)), csrOf(t, newKey(t))
		mixed := append(bytes.Clone(csr[:len(csr)-40]), other[len(other)-40:]...)
		for what, request := range map[string][]byte{"another key's signature": mixed, "no request": nil, "garbage": bytes.Repeat([]byte{0x30}, 4000)} {
			resp, err := ententev1.NewSignClient(conn).SignX509(t.Context(), &ententev1.SignX509Request{
				Requests: []*ententev1.X509Request{{EntryId: "service/accounts", Csr: request}},
			})
			if err != nil || codes.Code(resp.GetResults()[0].GetCode()) != codes.InvalidArgument || len(resp.GetResults()[0].GetCertificates()) != 0 {
				t.Errorf("%s: %v, %v", what, resp, err)
			}
		}
	})
	t.Run("tokens", func(t *testing.T) {
		anyone := dial(t, v.CA, nil)
		door, bound := ententev1.NewAttestClient(anyone), exporter(t, anyone)
		token := parseToken(t, v.AgentToken("h3", "dc1"))
		first := attestRequest(t, token, newKey(t), bound)
		if _, err := door.Attest(t.Context(), first); err != nil {
			t.Fatalf("control: %v", err)
		}
		_, err := door.Attest(t.Context(), attestRequest(t, token, newKey(t), bound))
		wantCode(t, "a replayed token", err, codes.PermissionDenied)
		elsewhere := dial(t, v.CA, nil)
		exporter(t, elsewhere)
		_, err = ententev1.NewAttestClient(elsewhere).Attest(t.Context(), first)
		wantCode(t, "the whole request on another connection", err, codes.PermissionDenied)
	})
	t.Run("resume", func(t *testing.T) {
		now := v.Status().GetRevision()
		for what, resume := range map[string]uint64{
			"the future": now + 1000, "a later epoch": 5<<44 | 1, "garbage": math.MaxUint64, "the last epoch": 511 << 44,
		} {
			s := openSync(t, conn, "resume "+what, 1, resume)
			wantCode(t, what, s.untilEnd(t), codes.Unavailable)
			if s.revision != 0 || len(s.entries) != 0 {
				t.Errorf("%s: told of revision %d", what, s.revision)
			}
		}
		s := openSync(t, conn, "resume", 9, now)
		s.until(t, "control: a true one", func() bool { return s.revision >= now })
		if s.full != 0 {
			t.Error("control: it got everything again")
		}
		s.cancel()
	})
	t.Run("scope", func(t *testing.T) {
		s := openSync(t, conn, "scope", 10, 0)
		s.until(t, "the full state", func() bool { return s.revision > 0 && s.complete })
		if !s.entries["service/accounts"] || len(s.entries) != 1 {
			t.Errorf("h1 is told of the entries %v", s.entries)
		}
		// It speaks for another host: nobody hears it.
		s.report(t, &ententev1.Instance{Service: "ledger", Agent: "h2", Address: "127.0.0.1:7000", Health: ententev1.Health_HEALTH_HEALTHY},
			&ententev1.Instance{Service: "accounts", Agent: "h2", Address: "127.0.0.1:7443", Health: ententev1.Health_HEALTH_HEALTHY})
		s.until(t, "control: its own instance", func() bool { return s.instances["accounts@h1"] != nil })
		if len(s.instances) != 1 {
			t.Errorf("instances %v", s.instances)
		}
		s.cancel()
	})
	t.Run("banned", func(t *testing.T) {
		thief := attest(t, v.CA, "h4")
		s := openSync(t, dial(t, v.CA, &thief), "banned", 1, 0)
		s.until(t, "control: the full state", func() bool { return s.revision > 0 })
		if _, err := v.Admin().BanAgent(t.Context(), &ententev1.ChangeAgentRequest{Name: "h4"}); err != nil {
			t.Fatal(err)
		}
		s.untilEnd(t)
		if _, err := sign(t, dial(t, v.CA, &thief), "", newKey(t)); err == nil {
			t.Error("a banned agent is served")
		}
	})
	t.Run("selectors", func(t *testing.T) {
		change := func(n int) error {
			e := &statev1.Entry{Id: "entry/job", Path: "/job", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1000"}}
			for i := range n {
				e.Selectors = append(e.Selectors, fmt.Sprint("unix:group:", i))
			}
			resp, err := v.Admin().ChangeEntries(t.Context(), &ententev1.ChangeEntriesRequest{Changes: []*statev1.EntryChange{{Action: &statev1.EntryChange_Create{Create: e}}}})
			if err == nil && resp.GetResults()[0].GetCode() != 0 {
				err = status.Error(codes.Code(resp.GetResults()[0].GetCode()), resp.GetResults()[0].GetError())
			}
			return err
		}
		wantCode(t, "100,000 selectors", change(100_000), codes.InvalidArgument)
		if err := change(3); err != nil {
			t.Errorf("control: %v", err)
		}
	})
	t.Run("sizes", func(t *testing.T) {
		_, err := ententev1.NewSignClient(conn).SignX509(t.Context(), &ententev1.SignX509Request{Requests: []*ententev1.X509Request{{Csr: make([]byte, 300<<10)}}})
		wantCode(t, "an oversize message", err, codes.ResourceExhausted)
		if n := v.metric(`entente_ca_limited_total{limit="message"}`); n != 1 {
			t.Errorf("%v oversize messages are counted", n)
		}
		ctx := metadata.AppendToOutgoingContext(t.Context(), "x-filler", strings.Repeat("x", 64<<10))
		_, err = ententev1.NewSignClient(dial(t, v.CA, &v.good)).SignX509(ctx, &ententev1.SignX509Request{})
		if err == nil || status.Code(err) == codes.InvalidArgument {
			t.Errorf("64 KiB of headers: %v", err)
		}
	})
	v.serves("afterwards")
}

// Handshakes that are begun and not ended, from the same address as everybody else: they
// take no more than their places, and lose them to whoever comes later.
func TestSlowHandshakes(t *testing.T) {
	t.Parallel()
	v := newVictim(t)
	const many = 1500                                      // more than there are places
	hello := []byte{0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3} // of a ClientHello that never ends
	conns := make([]net.Conn, 0, many)
	for i := range many {
		conn, err := net.Dial("tcp", v.Config().Listen.API)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		defer conn.Close()
		if i%2 == 0 {
			conn.Write(hello)
		}
		conns = append(conns, conn)
	}
	if open := v.metric(`entente_ca_connections{kind="handshake"}`); open > 1024 {
		t.Errorf("%v handshakes under way", open)
	}
	v.serves("during slow handshakes")
	for _, i := range []int{0, 1, many - 1} {
		v.ends(fmt.Sprint("slow handshake ", i), conns[i], 30*time.Second)
	}
	v.serves("after slow handshakes")
	if cut := v.metric(`entente_ca_connections_cut_total{kind="handshake"}`); cut == 0 {
		t.Error("no handshake lost its place")
	}
}

// An address that opens connections as fast as it can, and again as often as they are
// closed, makes nobody else wait behind them.
func TestFloodOfHandshakes(t *testing.T) {
	t.Parallel()
	v := newVictim(t)
	from := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 3)}}
	ctx, cancel := context.WithCancel(t.Context())
	var flood sync.WaitGroup
	defer flood.Wait()
	defer cancel()
	const many = 5000
	var opened atomic.Int64
	for range many {
		flood.Go(func() {
			for ctx.Err() == nil {
				conn, err := from.DialContext(ctx, "tcp", v.Config().Listen.API)
				if err == nil {
					opened.Add(1)
					stop := context.AfterFunc(ctx, func() { conn.Close() })
					io.Copy(io.Discard, conn)
					stop()
					conn.Close()
				}
				select {
				case <-ctx.Done():
				case <-time.After(500 * time.Millisecond):
				}
			}
		})
	}
	for until := time.Now().Add(20 * time.Second); opened.Load() < many && time.Now().Before(until); {
		time.Sleep(10 * time.Millisecond)
	}
	best := time.Hour
	for range 5 {
		begin := time.Now()
		v.raw(&v.good)
		best = min(best, time.Since(begin))
	}
	t.Logf("a handshake took %v", best)
	if best > time.Second {
		t.Errorf("the quickest of five handshakes took %v beside the flood", best)
	}
	if open := v.metric(`entente_ca_connections{kind="handshake"}`); open < 512 || open > 1024 {
		t.Errorf("control: %v handshakes are under way", open)
	}
}

// Clients that shake hands and then say little: no preface, half a header, half a
// message. Each ends, and keeps nobody out.
func TestSlowloris(t *testing.T) {
	t.Parallel()
	v := newVictim(t)
	open := func() (*tls.Conn, *http2.Framer) {
		conn := v.raw(&v.good)
		if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
			t.Fatal(err)
		}
		framer := http2.NewFramer(conn, conn)
		framer.WriteSettings()
		return conn, framer
	}
	var ends sync.WaitGroup
	defer ends.Wait()
	slow := func(what string, conn *tls.Conn) {
		ends.Go(func() { v.ends(what, conn, 40*time.Second) })
	}

	slow("no preface", v.raw(&v.good))
	half := v.raw(&v.good)
	io.WriteString(half, http2.ClientPreface[:10])
	slow("half a preface", half)

	conn, framer := open()
	block := headers(t, ententev1.Sign_SignX509_FullMethodName)
	framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block[:len(block)/2]})
	slow("half the headers", conn)

	// Half a message, and every ping answered: the call ends, whatever the connection does.
	conn, framer = open()
	framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block, EndHeaders: true})
	message := binary.BigEndian.AppendUint32([]byte{0}, 100_000)
	framer.WriteData(1, false, append(message, make([]byte, 1000)...))
	begin := time.Now()
	conn.SetReadDeadline(begin.Add(40 * time.Second))
	for ended := false; !ended; {
		frame, err := framer.ReadFrame()
		if err != nil {
			t.Fatalf("half a message: %v", err)
		}
		switch f := frame.(type) {
		case *http2.PingFrame:
			if !f.IsAck() {
				framer.WritePing(true, f.Data)
			}
		case *http2.SettingsFrame:
			if !f.IsAck() {
				framer.WriteSettingsAck()
			}
		case *http2.RSTStreamFrame, *http2.HeadersFrame:
			ended = true
		}
	}
	t.Logf("the half message ended after %v", time.Since(begin))
	v.serves("beside slow clients")

	// Whoever has no identity finds few places; who has one does not need them.
	for range 400 {
		conn, err := tls.Dial("tcp", v.Config().Listen.API, &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		if err == nil {
			defer conn.NetConn().Close()
		}
	}
	if n := v.metric(`entente_ca_connections{kind="stranger"}`); n > 256 {
		t.Errorf("%v connections without an identity", n)
	}
	v.serves("beside idle strangers")
}

func nodeCertificate(t testing.TB, key crypto.Signer) tls.Certificate {
	t.Helper()
	cert, err := peer.SelfSigned(key, "ca-2")
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// headers is the header block of a call.
func headers(t testing.TB, method string) []byte {
	t.Helper()
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, f := range [][2]string{{":method", "POST"}, {":scheme", "https"}, {":path", method}, {":authority", "ca"}, {"content-type", "application/grpc"}, {"te", "trailers"}} {
		if err := enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}); err != nil {
			t.Fatal(err)
		}
	}
	return block.Bytes()
}

// Calls that are begun and reset at once, as fast as they can be written.
// Not parallel: what the process holds is measured.
func TestRapidReset(t *testing.T) {
	v := newVictim(t)
	before := heap()
	block := headers(t, ententev1.Sync_Sync_FullMethodName)
	var attackers sync.WaitGroup
	var sent atomic.Int64
	for range 2 {
		conn := v.raw(&v.good)
		attackers.Go(func() {
			go io.Copy(io.Discard, conn)
			io.WriteString(conn, http2.ClientPreface)
			framer := http2.NewFramer(conn, conn)
			framer.WriteSettings()
			for i := range 5000 {
				id := uint32(2*i + 1)
				if framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block, EndHeaders: true}) != nil ||
					framer.WriteRSTStream(id, http2.ErrCodeCancel) != nil {
					return
				}
				sent.Add(1)
			}
		})
	}
	v.serves("during rapid resets")
	attackers.Wait()
	if n := v.metric("entente_ca_calls_under_way"); n > 256 {
		t.Errorf("%v calls of one agent are under way", n)
	}
	v.serves("after rapid resets")
	if grown := int64(heap()) - int64(before); grown > 64<<20 {
		t.Errorf("the process grew by %d MiB", grown>>20)
	}
	t.Logf("%d calls begun and reset", sent.Load())
}

// Thousands of idle streams on hundreds of connections, of few agents: each agent keeps
// what one needs. ENTENTE_IDLE_STREAMS is how many are tried. Not parallel: what the
// process holds is measured.
func TestIdleStreams(t *testing.T) {
	streams := 1000
	if testing.Short() {
		streams = 300
	}
	if text := os.Getenv("ENTENTE_IDLE_STREAMS"); text != "" {
		var err error
		if streams, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	v := newVictim(t)
	const agents, perConn = 4, 50
	certs := make([]tls.Certificate, agents)
	for i := range certs {
		certs[i] = attest(t, v.CA, fmt.Sprint("evil", i))
	}
	before := heap()
	var refused, other atomic.Int64
	var opening sync.WaitGroup
	for i := 0; i < streams; i += perConn {
		conn := dial(t, v.CA, &certs[i/perConn%agents])
		opening.Go(func() {
			var waiting sync.WaitGroup
			for range perConn {
				waiting.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
					defer cancel()
					stream, err := ententev1.NewSyncClient(conn).Sync(ctx, grpc.WaitForReady(true))
					if err == nil {
						_, err = stream.Recv() // no Hello: it only sits there
					}
					switch status.Code(err) {
					case codes.ResourceExhausted:
						refused.Add(1)
					case codes.DeadlineExceeded, codes.Unavailable, codes.Canceled:
						other.Add(1)
					default:
						t.Errorf("an idle stream: %v", err)
					}
				})
			}
			waiting.Wait()
		})
	}
	time.Sleep(time.Second) // the attack goes on
	underWay := v.metric("entente_ca_calls_under_way")
	if underWay > agents*256+8 {
		t.Errorf("%v streams and calls of %d agents are under way", underWay, agents)
	}
	if n := v.metric(`entente_ca_connections{kind="peer"}`); n > agents*16+4 {
		t.Errorf("%v connections of %d agents", n, agents)
	}
	grown := int64(heap()) - int64(before) // with the attackers' own half
	v.serves("beside idle streams")
	opening.Wait()
	t.Logf("%d streams: %v under way after a second; %d refused, %d cut or let sit; grown by %d KiB", streams, underWay, refused.Load(), other.Load(), grown>>10)
	if refused.Load() == 0 {
		t.Error("none was refused")
	}
	if n := v.metric(`entente_ca_limited_total{limit="streams"}`); n == 0 {
		t.Error("none is counted")
	}
	if grown > 96<<20 {
		t.Errorf("the process grew by %d MiB", grown>>20)
	}
}

// A statement that is bound to one connection, and a member's own: nothing of a join is
// worth anything elsewhere.
func TestReplayedJoin(t *testing.T) {
	t.Parallel()
	v := newVictim(t)
	token := parseToken(t, v.NodeToken("ca-2", "dc2"))
	key := newKey(t)
	cert := nodeCertificate(t, key)
	first, second := dial(t, v.CA, &cert), dial(t, v.CA, &cert)
	statement, signature, err := token.Sign(keyIDOf(t, key), exporter(t, first))
	if err != nil {
		t.Fatal(err)
	}
	req := &ententev1.JoinRequest{TokenId: token.ID, Statement: statement, Signature: signature, RaftAddress: "127.0.0.9:7000", ApiAddress: "127.0.0.9:7001"}
	exporter(t, second)
	_, err = ententev1.NewJoinClient(second).Join(t.Context(), req)
	wantCode(t, "on another connection", err, codes.PermissionDenied)
	thief := nodeCertificate(t, newKey(t))
	other := dial(t, v.CA, &thief)
	bound := exporter(t, other)
	_, err = ententev1.NewJoinClient(other).Join(t.Context(), req)
	wantCode(t, "with another key", err, codes.PermissionDenied)
	statement, signature, err = token.Sign(keyIDOf(t, key), bound) // the seed was seen, the key was not
	if err != nil {
		t.Fatal(err)
	}
	_, err = ententev1.NewJoinClient(other).Join(t.Context(), &ententev1.JoinRequest{TokenId: token.ID, Statement: statement, Signature: signature, RaftAddress: "127.0.0.9:7000", ApiAddress: "127.0.0.9:7001"})
	wantCode(t, "for a key that is not the connection's", err, codes.PermissionDenied)
	v.serves("afterwards")
}
