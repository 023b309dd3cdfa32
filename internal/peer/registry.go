package peer

import (
	"container/heap"
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
)

const (
	// A handshake verifies in its middle; the connection is tracked after its end. Whatever changed in between is caught by
	// checking again at Track when a Recheck ran this shortly before. No handshake of ours may take longer.
	handshakeLimit = time.Minute
	// Timers run on the monotonic clock, certificates on the wall clock: look at least this often.
	expiryLook = 15 * time.Second
)

var errExpired = errors.New("the peer's certificate has expired")

// Registry keeps the open connections whose peers were verified, and closes those whose peer would not be accepted any more:
// at [Registry.Recheck], and, while [Registry.Run] runs, when the peer's certificate ends. The zero value is ready to use;
// all methods may be called concurrently.
//
// It closes by cutting the transport, without a TLS close alert: a peer that does not read could hold up an alert for
// seconds. Whoever serves the connection sees its reads and writes fail.
type Registry struct {
	// Log gets a line for each connection that is cut; nil is silent. Set it before use.
	Log *slog.Logger

	rechecking sync.Mutex   // one Recheck at a time
	rechecked  atomic.Int64 // Unix nanoseconds when the last Recheck began

	mu   sync.Mutex
	open expiryHeap    // guarded by mu; soonest end first
	wake chan struct{} // guarded by mu; while Run waits: closed when a connection ends sooner than it knows
}

type tracked struct {
	conn    net.Conn
	recheck func() error
	restsOn []string
	end     time.Time // when the peer's leaf expires
	place   int       // in the heap, guarded by Registry.mu; -1: not tracked any more
}

// restsOnOneOf reports whether what is tracked may be refused after these have changed.
func (t *tracked) restsOnOneOf(changed map[string]struct{}) bool {
	for _, name := range t.restsOn {
		if _, ok := changed[name]; ok {
			return true
		}
	}
	return len(t.restsOn) == 0
}

// Track keeps c until untrack is called, which may be done more than once. state is that of its finished handshake; recheck
// says whether the peer would still be accepted now (nil: only expiry counts) and is not called concurrently for one
// connection. See [Recheck] for the usual one. If the peer is refused already, c is closed before Track returns.
//
// restsOn names the records that recheck looks at and that are not everybody's: see [Registry.RecheckOf].
func (r *Registry) Track(c net.Conn, state tls.ConnectionState, recheck func() error, restsOn ...string) (untrack func()) {
	t := &tracked{conn: c, recheck: recheck, restsOn: restsOn, place: -1}
	if len(state.PeerCertificates) > 0 {
		t.end = state.PeerCertificates[0].NotAfter
	} else {
		t.end = time.Unix(1<<40, 0) // an anonymous peer has nothing that ends
	}
	r.mu.Lock()
	heap.Push(&r.open, t)
	if t.place == 0 && r.wake != nil {
		close(r.wake)
		r.wake = nil
	}
	r.mu.Unlock()

	if last := r.rechecked.Load(); last != 0 && time.Since(time.Unix(0, last)) < handshakeLimit {
		r.rechecking.Lock()
		r.check(t)
		r.rechecking.Unlock()
	}
	return func() { r.remove(t) }
}

// Recheck asks every connection's recheck function and closes those that are refused. It returns how many were closed.
// Call it after what they depend on has changed: bundles, agreements, entries, own SVID. On return, no connection that was
// tracked before the call and is refused by now is open.
func (r *Registry) Recheck() (closed int) {
	return r.recheck(func(*tracked) bool { return true })
}

// RecheckOf is Recheck where nothing has changed but the records with these names: it asks the connections that rest on
// one of them, and those that were tracked without names.
func (r *Registry) RecheckOf(changed map[string]struct{}) (closed int) {
	return r.recheck(func(t *tracked) bool { return t.restsOnOneOf(changed) })
}

func (r *Registry) recheck(concerned func(*tracked) bool) (closed int) {
	r.rechecking.Lock()
	defer r.rechecking.Unlock()
	r.rechecked.Store(time.Now().UnixNano()) // before the look at the open ones: see Track

	r.mu.Lock()
	all := make([]*tracked, 0, len(r.open))
	for _, t := range r.open {
		if concerned(t) {
			all = append(all, t)
		}
	}
	r.mu.Unlock()

	var next, count atomic.Int64
	var workers sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(all)) {
		workers.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= len(all) {
					return
				}
				if !r.check(all[i]) {
					count.Add(1)
				}
			}
		})
	}
	workers.Wait()
	return int(count.Load())
}

// Len returns the number of open connections.
func (r *Registry) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.open)
}

// Run closes each connection when its peer's certificate ends, until ctx is done; then it returns ctx.Err() and leaves the
// connections to those who serve them.
func (r *Registry) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		now := time.Now()
		var expired []*tracked
		r.mu.Lock()
		for len(r.open) > 0 && !now.Before(r.open[0].end) {
			expired = append(expired, heap.Pop(&r.open).(*tracked))
		}
		wait := expiryLook
		if len(r.open) > 0 {
			wait = min(wait, r.open[0].end.Sub(now))
		}
		wake := make(chan struct{})
		r.wake = wake
		r.mu.Unlock()
		for _, t := range expired {
			r.cut(t, errExpired)
		}

		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		case <-wake:
		}
	}
}

// check cuts t if its peer is refused now. The caller holds rechecking.
func (r *Registry) check(t *tracked) (ok bool) {
	var err error
	switch {
	case !time.Now().Before(t.end):
		err = errExpired
	case t.recheck != nil:
		err = t.recheck()
	}
	if err == nil || !r.remove(t) {
		return true // accepted, or closed meanwhile
	}
	r.cut(t, err)
	return false
}

func (r *Registry) remove(t *tracked) (was bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if t.place < 0 {
		return false
	}
	heap.Remove(&r.open, t.place)
	return true
}

func (r *Registry) cut(t *tracked, why error) {
	if r.Log != nil {
		r.Log.Info("connection cut: its peer is not accepted any more", "peer_address", t.conn.RemoteAddr().String(), "reason", why.Error())
	}
	transport(t.conn).Close()
}

// transport returns what lies below TLS and other wrappers.
func transport(c net.Conn) net.Conn {
	for {
		wrapper, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			return c
		}
		inner := wrapper.NetConn()
		if inner == nil {
			return c
		}
		c = inner
	}
}

// Recheck is the usual function for [Registry.Track]: the peer's SVID must still verify, and authz must still admit it. It
// holds a [Proof], so a recheck of thousands of connections takes milliseconds.
func Recheck(state tls.ConnectionState, bundles x509bundle.Source, authz Authorize) func() error {
	var proof Proof
	return func() error {
		id, err := proof.Verify(state.PeerCertificates, bundles, time.Now())
		if err != nil {
			return err
		}
		return authorize(authz, id)
	}
}

// expiryHeap implements heap.Interface.
type expiryHeap []*tracked

func (h expiryHeap) Len() int           { return len(h) }
func (h expiryHeap) Less(i, j int) bool { return h[i].end.Before(h[j].end) }
func (h expiryHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].place, h[j].place = i, j
}

func (h *expiryHeap) Push(x any) {
	t := x.(*tracked)
	t.place = len(*h)
	*h = append(*h, t)
}

func (h *expiryHeap) Pop() any {
	last := len(*h) - 1
	t := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	t.place = -1
	return t
}
