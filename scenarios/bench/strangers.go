package main

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/meshagent/nodeattest"
)

// sources is how many addresses strangers come from.
const sources = 16

// measureStrangers has strangers ask one CA node to be admitted, as fast as it answers,
// and compares what it writes with what it writes when nobody asks. Then a host with a
// token attests among them, which must be seen in the same numbers.
func measureStrangers(ctx context.Context, b *bench) error {
	d, err := b.domain(ctx, 1)
	if err != nil {
		return err
	}
	defer d.close()
	n := d.nodes[0]
	genuine, err := d.token(ctx, "genuine")
	if err != nil {
		return err
	}
	var known [2]*ca.Token // of others, a host and a CA node: strangers know the ids
	for i, create := range []func(context.Context, string) (string, error){d.token, d.nodeToken} {
		text, err := create(ctx, "victim")
		if err != nil {
			return err
		}
		if known[i], err = ca.ParseToken(text); err != nil {
			return err
		}
	}
	if err := sleep(ctx, b.while()); err != nil { // what the start writes is over
		return err
	}

	window := max(3*b.while(), 2*time.Second)
	b.say("nobody asks to be admitted for %.0f s", window.Seconds())
	idle, err := n.writes(ctx, func(ctx context.Context) error { return sleep(ctx, window) })
	if err != nil {
		return err
	}
	b.say("strangers ask from %d addresses for %.0f s", sources, window.Seconds())
	var asked flood
	grown, err := n.writes(ctx, func(ctx context.Context) error { return asked.run(ctx, n, known, window, nil) })
	if err != nil {
		return err
	}
	b.say("and a host with a token among them")
	var among flood
	control, err := n.writes(ctx, func(ctx context.Context) error {
		return among.run(ctx, n, known, window, func(ctx context.Context) error {
			return d.until(ctx, "a host with a token is admitted among strangers", func(ctx context.Context) error {
				_, err := d.attest(ctx, "genuine", genuine)
				return err
			})
		})
	})
	if err != nil {
		return err
	}
	admission := control.beyond(idle)
	if admission <= 0 {
		return errors.New("a host that was admitted wrote nothing: nothing is measured by this")
	}
	requests := asked.answered.Load()
	b.report("strangers_log_bytes", grown.beyond(idle), int(requests),
		"%d requests from %d addresses, %.0f/s, %d of them sent away for their rate or for want of a place, the others refused (unknown token, known token with a false signature, request that does not decode); the audit log grew by %d bytes (%d when nobody asked); the log got %d entries (%d when nobody asked); a host admitted among as many strangers: %.0f bytes",
		requests, sources, float64(requests)/window.Seconds(), asked.busy.Load(), grown.audit, idle.audit, grown.entries, idle.entries, admission)
	return nil
}

// written is what a CA node has on its disk, or what came to it.
type written struct {
	entries uint64 // of the log
	log     uint64 // bytes of them
	files   int64  // bytes of the other files but the audit log
	audit   int64  // bytes of that
}

// writes is what the node writes while f runs.
func (n *caNode) writes(ctx context.Context, f func(context.Context) error) (written, error) {
	before, err := n.written(ctx)
	if err != nil {
		return written{}, err
	}
	if err := f(ctx); err != nil {
		return written{}, err
	}
	after, err := n.written(ctx)
	if err != nil {
		return written{}, err
	}
	if after.log < before.log { // a snapshot was taken: the bytes count from there
		before.log = 0
	}
	return written{after.entries - before.entries, after.log - before.log, after.files - before.files, after.audit - before.audit}, nil
}

func (n *caNode) written(ctx context.Context) (w written, err error) {
	is, err := n.admin.Status(ctx, &ententev1.StatusRequest{})
	if err != nil {
		return written{}, err
	}
	w.entries, w.log = is.GetAppliedIndex(), is.GetLogBytes()
	err = filepath.WalkDir(n.config.DataDir, func(path string, f fs.DirEntry, err error) error {
		if err != nil || !f.Type().IsRegular() {
			return err
		}
		info, err := f.Info()
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return err
		case strings.HasPrefix(f.Name(), "audit.log"):
			w.audit += info.Size()
		case f.Name() != raftLog:
			w.files += info.Size()
		}
		return nil
	})
	return w, err
}

// raftLog grows in steps and has room for later entries: its entries are counted instead.
const raftLog = "log.db"

// beyond is how many bytes more were written than in as long a time without strangers, in
// which only ticks of one size are. A busy node may be late with some, or squeeze one more
// into the time.
func (w written) beyond(idle written) float64 {
	tick := float64(idle.log) / float64(max(idle.entries, 1))
	return max(float64(w.log)-float64(min(w.entries, idle.entries+1))*tick, 0) + float64(max(w.files-idle.files, 0))
}

// flood is strangers that ask to be admitted.
type flood struct {
	answered, busy atomic.Int64
}

// run floods for so long. meanwhile, if any, runs in the midst of it and must end in time.
func (f *flood) run(ctx context.Context, n *caNode, known [2]*ca.Token, d time.Duration, meanwhile func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	until := time.Now().Add(d)
	var all sync.WaitGroup
	for i := range sources {
		all.Go(func() {
			for ctx.Err() == nil && time.Now().Before(until) {
				if err := f.come(ctx, n, known, i, until); err != nil {
					cancel(err)
				}
			}
		})
	}
	if meanwhile != nil {
		if err := meanwhile(ctx); err != nil {
			cancel(err)
		}
	}
	all.Wait()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if f.answered.Load() == f.busy.Load() {
		return errors.New("no stranger was heard: all were sent away for their number")
	}
	return nil
}

// come is a stranger from one address, who asks until he loses his connections. The error
// is that somebody was admitted.
func (f *flood) come(ctx context.Context, n *caNode, known [2]*ca.Token, source int, until time.Time) error {
	s, err := newStranger(ctx, n, source)
	if err != nil {
		return err
	}
	defer s.close()
	requests, err := s.requests(ctx, known)
	if err != nil {
		return nil // his connections did not last
	}
	for i := 0; ctx.Err() == nil && time.Now().Before(until); i++ {
		err := requests[i%len(requests)](ctx)
		switch status.Code(err) {
		case codes.OK:
			return errors.New("a stranger was admitted")
		case codes.Unavailable, codes.Canceled:
			return nil
		case codes.ResourceExhausted:
			f.busy.Add(1)
		}
		f.answered.Add(1)
	}
	return nil
}

// stranger has two connections from one address, without a certificate and with one that
// nobody knows.
type stranger struct {
	key         crypto.Signer
	anonymous   *grpc.ClientConn
	certificate *grpc.ClientConn
}

func newStranger(ctx context.Context, n *caNode, source int) (s *stranger, err error) {
	s = &stranger{}
	if s.key, err = nodeattest.NewKey(); err != nil {
		return nil, err
	}
	own, err := peer.SelfSigned(s.key, "stranger")
	if err != nil {
		return nil, err
	}
	dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 9, 0, byte(1+source))}}
	dial := func(certificates ...tls.Certificate) (*grpc.ClientConn, error) {
		return grpc.NewClient("passthrough:///"+n.config.Listen.API,
			grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, Certificates: certificates})),
			grpc.WithContextDialer(func(ctx context.Context, to string) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", to) }),
			grpc.WithDisableServiceConfig(), grpc.WithDisableRetry())
	}
	if s.anonymous, err = dial(); err != nil {
		return nil, err
	}
	s.certificate, err = dial(own)
	return s, err
}

func (s *stranger) close() {
	s.anonymous.Close()
	if s.certificate != nil {
		s.certificate.Close()
	}
}

// requests are what strangers ask for: made once, since the CA node's work counts here,
// not theirs.
func (s *stranger) requests(ctx context.Context, known [2]*ca.Token) ([]func(context.Context) error, error) {
	spki, err := x509.MarshalPKIXPublicKey(s.key.Public())
	if err != nil {
		return nil, err
	}
	csr, err := nodeattest.CSR(s.key)
	if err != nil {
		return nil, err
	}
	// A true statement for the connection, signed with a seed of the stranger's own.
	forge := func(conn *grpc.ClientConn, token *ca.Token, id string) (statement, signature []byte, err error) {
		bound, err := exporter(ctx, conn)
		if err != nil {
			return nil, nil, err
		}
		return ca.SignStatement(make([]byte, ed25519.SeedSize), &statev1.JoinStatement{
			ClusterId: token.ClusterID, Epoch: token.Epoch, TokenId: id, Role: token.Role, KeyId: ca.KeyID(spki), Exporter: bound,
		})
	}
	attest, join := ententev1.NewAttestClient(s.anonymous), ententev1.NewJoinClient(s.certificate)
	var all []func(context.Context) error
	for _, id := range []string{"nosuch", known[0].ID} {
		statement, signature, err := forge(s.anonymous, known[0], id)
		if err != nil {
			return nil, err
		}
		request := &ententev1.AttestRequest{TokenId: id, Statement: statement, Signature: signature, Csr: csr}
		all = append(all, func(ctx context.Context) error {
			_, err := attest.Attest(ctx, request)
			return err
		})
	}
	for _, id := range []string{"nosuch", known[1].ID} {
		statement, signature, err := forge(s.certificate, known[1], id)
		if err != nil {
			return nil, err
		}
		for _, signature := range [][]byte{signature, make([]byte, 40<<10)} {
			request := &ententev1.JoinRequest{TokenId: id, Statement: statement, Signature: signature, RaftAddress: "127.0.0.9:7000", ApiAddress: "127.0.0.9:7001"}
			all = append(all, func(ctx context.Context) error {
				_, err := join.Join(ctx, request)
				return err
			})
		}
	}
	garbage := &ententev1.AttestRequest{Csr: make([]byte, 1<<10)}
	return append(all, func(ctx context.Context) error {
		_, err := attest.Attest(ctx, garbage)
		return err
	}), nil
}

// exporter is what binds a statement to a connection.
func exporter(ctx context.Context, conn *grpc.ClientConn) ([]byte, error) {
	var remote grpcpeer.Peer
	_, err := ententev1.NewAttestClient(conn).Attest(ctx, &ententev1.AttestRequest{}, grpc.Peer(&remote))
	info, ok := remote.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil, fmt.Errorf("no connection: %w", err)
	}
	return info.State.ExportKeyingMaterial(ca.ExporterLabel, nil, ca.ExporterSize)
}
