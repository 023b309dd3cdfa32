package client

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/internal/peer"
)

const (
	hedgeAfter     = 200 * time.Millisecond // then the next node is dialled as well
	connectTimeout = 5 * time.Second        // for one node, TLS included
	maxMessage     = 16 << 20               // bytes of one gRPC message

	// window is what a node may send unread, of a stream and of a connection. That it is
	// fixed spares both ends a ping with each message, by which gRPC would find it.
	window = 1 << 20
)

// conn is one authenticated connection to a CA node.
type conn struct {
	address string
	state   tls.ConnectionState
	own     *x509.Certificate // the leaf this side showed; nil: none
	key     crypto.Signer     // of own
	rpc     *grpc.ClientConn
	tls     *tls.Conn
}

// close closes the connection as well, in case rpc has not come to take it over.
func (c *conn) close() {
	c.rpc.Close()
	c.tls.Close()
}

// candidates are the addresses to dial, in order: those that did not just fail
// before those that did, the own datacenter's before the others', and equals in
// random order, so that a domain's clients spread over its nodes.
func (c *Client) candidates(except []string) []string {
	near := map[string]bool{}
	var addresses []string
	add := func(address string) {
		if address != "" && !slices.Contains(except, address) && !slices.Contains(addresses, address) {
			addresses = append(addresses, address)
		}
	}
	more, not := c.compare.addresses()
	for _, m := range append(slices.Clone(c.store.Snapshot().Members), more...) {
		near[m.GetApiAddress()] = m.GetDatacenter() == c.cfg.Datacenter
		add(m.GetApiAddress())
	}
	for _, address := range c.cfg.Addresses {
		add(address)
	}
	addresses = slices.DeleteFunc(addresses, func(address string) bool { return not[address] })
	rand.Shuffle(len(addresses), func(i, j int) { addresses[i], addresses[j] = addresses[j], addresses[i] })

	c.mu.Lock()
	defer c.mu.Unlock()
	rank := func(address string) (r int) {
		if c.failures[address] > 0 {
			r += 2
		}
		if !near[address] {
			r++
		}
		return r
	}
	slices.SortStableFunc(addresses, func(a, b string) int { return rank(a) - rank(b) })
	return addresses
}

// outcome remembers whether a node was of use, for the next order of dialling.
func (c *Client) outcome(address string, good bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if good {
		delete(c.failures, address)
	} else {
		c.failures[address]++
	}
}

// connect returns the first connection that stands to a CA node, dialling nearest first
// and hedged. It leaves no other connection behind.
func (c *Client) connect(ctx context.Context, except ...string) (*conn, error) {
	found, err := c.connectTo(ctx, c.candidates(except), c.acceptsNode)
	dropped := c.compare.dropped()
	if err == nil || len(dropped) == 0 || ctx.Err() != nil {
		return found, err
	}
	var addresses []string
	for _, m := range dropped {
		if a := m.GetApiAddress(); a != "" && !slices.Contains(except, a) {
			addresses = append(addresses, a)
		}
	}
	found, again := c.connectTo(ctx, addresses, func(state tls.ConnectionState) error {
		if !slices.ContainsFunc(dropped, func(m *statev1.Member) bool { return m.GetId() == nodeID(state) }) {
			return fmt.Errorf("it is no CA node of %s", c.cfg.TrustDomain.Name())
		}
		return nil
	})
	if again != nil {
		return nil, err
	}
	c.log.Warn("no CA node of the last member table is in reach; using one of the last table that two CA nodes agreed on", "address", found.address)
	return found, nil
}

// connectTo is connect with these addresses, in this order, and whom accept accepts.
func (c *Client) connectTo(ctx context.Context, addresses []string, accept func(tls.ConnectionState) error) (*conn, error) {
	if len(addresses) == 0 {
		return nil, fmt.Errorf("%w: no address is left to try", ErrUnreachable)
	}

	type result struct {
		conn *conn
		err  error
	}
	results := make(chan result, len(addresses))
	ctx, cancel := context.WithCancel(ctx)
	var dials sync.WaitGroup
	var winner *conn
	defer func() { // the losers are stopped, waited for and closed
		cancel()
		dials.Wait()
		close(results)
		for r := range results {
			if r.conn != nil {
				r.conn.close()
			}
		}
	}()

	started, finished := 0, 0
	next := func() {
		address := addresses[started]
		started++
		dials.Go(func() {
			conn, err := c.dialAs(ctx, address, true, accept)
			results <- result{conn, err}
		})
	}
	next()
	hedge := time.NewTicker(hedgeAfter)
	defer hedge.Stop()
	var failures []error
	for finished < len(addresses) {
		select {
		case r := <-results:
			finished++
			if r.err == nil {
				winner = r.conn
				return winner, nil
			}
			failures = append(failures, r.err)
			if started < len(addresses) {
				next()
				hedge.Reset(hedgeAfter)
			}
		case <-hedge.C:
			if started < len(addresses) {
				next()
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return nil, fmt.Errorf("%w: %w", ErrUnreachable, errors.Join(failures...))
}

// dialAs opens and authenticates one connection: it shows this client's SVID or nothing,
// and accepts whom accept does. TLS is ours and gRPC runs over the finished connection, so
// that a request can speak of it (its exporter), and so that there is never a second
// connection that was not asked for.
func (c *Client) dialAs(ctx context.Context, address string, showSVID bool, accept func(tls.ConnectionState) error) (*conn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()

	failed := func(err error) (*conn, error) {
		if ctx.Err() != context.Canceled { // another node was faster: no fault of this one
			c.outcome(address, false)
		}
		return nil, fmt.Errorf("CA node at %s: %w", address, err)
	}
	raw, err := c.cfg.Dial(ctx, "tcp", address)
	if err != nil {
		return failed(err)
	}
	var own tls.Certificate
	secure := tls.Client(raw, c.tlsConfig(&own, showSVID, accept))
	if err := secure.HandshakeContext(ctx); err != nil {
		raw.Close()
		return failed(err)
	}

	once := make(chan net.Conn, 1)
	once <- secure
	rpc, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case conn := <-once:
				return conn, nil
			default:
				return nil, errors.New("the connection has ended")
			}
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableRetry(),
		grpc.WithIdleTimeout(0),
		grpc.WithInitialWindowSize(window),
		grpc.WithInitialConnWindowSize(window),
	)
	if err != nil {
		secure.Close()
		return failed(err)
	}
	rpc.Connect()
	key, _ := own.PrivateKey.(crypto.Signer)
	return &conn{address: address, state: secure.ConnectionState(), own: own.Leaf, key: key, rpc: rpc, tls: secure}, nil
}

// tlsConfig sets own to the client certificate when the node asks for one.
func (c *Client) tlsConfig(own *tls.Certificate, showSVID bool, accept func(tls.ConnectionState) error) *tls.Config {
	var show peer.Certificate
	if showSVID && c.cfg.SVID != nil {
		show = func() (*tls.Certificate, error) {
			cert, err := peer.FromSVID(c.cfg.SVID)()
			if err == nil {
				*own = *cert
			}
			return cert, err
		}
	}
	return peer.Client(show, accept, "h2")
}

// acceptsNode says why the other end of a connection is no CA node of this domain. Once
// the member table is known, a node is who holds the key of a member: an authority signs
// any name, also that of a node that was removed, or of another node for its own key.
func (c *Client) acceptsNode(state tls.ConnectionState) error {
	accept := peer.Pin(c.pinned)
	if known, err := c.compare.refuses(nodeID(state)); err != nil || known {
		return err
	}
	if c.cfg.Bundles != nil && len(c.store.Snapshot().Members) == 0 {
		accept = peer.Either(accept, peer.SVID(c.cfg.Bundles, c.isNode))
	}
	return accept(state)
}

// pinned accepts a CA node by its key. The pins of a join token end with the
// member table: a node that was removed since must not be believed.
func (c *Client) pinned(keyID string) error {
	members := c.store.Snapshot().Members
	known := slices.ContainsFunc(members, func(m *statev1.Member) bool { return m.GetId() == keyID })
	if known || len(members) == 0 && c.cfg.Pins != nil && c.cfg.Pins(keyID) {
		return nil
	}
	return fmt.Errorf("it is no CA node of %s", c.cfg.TrustDomain.Name())
}

// isNode accepts a CA node by the name in its SVID.
func (c *Client) isNode(id spiffeid.ID) error {
	name, isNode := strings.CutPrefix(id.Path(), "/entente/ca/")
	if id.TrustDomain() != c.cfg.TrustDomain || !isNode || strings.Contains(name, "/") {
		return fmt.Errorf("it is no CA node of %s", c.cfg.TrustDomain.Name())
	}
	return nil
}
