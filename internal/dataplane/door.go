package dataplane

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/dataplane/header"
	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/internal/problem"
	"github.com/entente-mesh/entente/internal/refusal"
	"github.com/entente-mesh/entente/internal/secret"
)

var alpn = []string{"h2", "http/1.1"}

// Outbound is the door of one calling identity: an application behind a loopback
// listener, or an edge that calls ForwardUser.
type Outbound struct {
	engine   *Engine
	identity Identity
	hop      string
	place    catalog.Place
}

// Outbound makes the outbound door of an application, for the identity it calls with.
func (e *Engine) Outbound(identity Identity) *Outbound {
	return &Outbound{e, identity, "outbound", catalog.Place{Datacenter: e.cfg.Datacenter, Role: catalog.Sidecar}}
}

// Edge makes the outbound door of an edge listener: the same, in the name of the edge's identity.
func (e *Engine) Edge(identity Identity) *Outbound {
	return &Outbound{e, identity, "edge", catalog.Place{Datacenter: e.cfg.Datacenter, Role: catalog.Edge}}
}

// Serve serves plain HTTP on a local listener until ctx is done, then drains. attest is
// called before the first byte of a connection is read; on its error the
// connection is closed. Serve owns ln.
func (o *Outbound) Serve(ctx context.Context, ln net.Listener, attest Attest) error {
	return o.engine.servePlain(ctx, ln, attest, func(w http.ResponseWriter, r *http.Request) {
		if header.IsBrowser(r.Header) {
			o.Refuse(w, r, r.Host, problem.Problem{
				Reason: refusal.Browser,
				Detail: "This listener is for the workload's own calls, not for pages in a browser.",
			}, "")
			return
		}
		o.Forward(w, r, r.Host)
	})
}

// Attest says why the process at the other end of a local connection may not stand there;
// nil if it may. again says it for the time when entries have changed (Engine.Reattest); it
// is not called concurrently. nil: nobody asks.
type Attest func(conn net.Conn) (again func() error, err error)

// Forward sends r to a service in the name of the door's identity and copies the
// answer to w. service is the service name, a port behind it is ignored; r.Host is not
// looked at. Protected names in r are removed.
func (o *Outbound) Forward(w http.ResponseWriter, r *http.Request, service string) {
	x := o.engine.begin(o.hop, w, r, service)
	defer x.end()
	x.caller(o.identity.ID)
	header.RemoveProtected(r.Header)
	if x.resolve() && x.decide() {
		x.forward(o.identity, o.place, nil)
	}
}

// Drained tells whether an edge is to end each connection with its next answer.
func (o *Outbound) Drained() bool { return o.engine.Drained() != nil }

// user is a client without an SVID that an edge has let in.
type user struct {
	pass  []string    // credentials that the service is to see, "?name" in the query; none of an import
	token secret.Text // its bearer token, which goes nowhere else either
	until time.Time   // when what let it in ends
	still func() error
}

// passes are the names of pass that stand in the query, or those that do not.
func (u *user) passes(inQuery bool) (names []string) {
	for _, name := range u.pass {
		if parameter, ok := strings.CutPrefix(name, "?"); ok == inQuery {
			names = append(names, parameter)
		}
	}
	return names
}

// ForwardUser is Forward for a client without an SVID, whom an edge has let in until a
// point in time: then its streams are cut, or when still gives an error, which is asked
// when the view changes and each second. Its credentials go no further, but those that
// pass names (a field, or "?" and a parameter of the query), and none goes to another
// domain. What it says of how it came here is replaced by what is so.
func (o *Outbound) ForwardUser(w http.ResponseWriter, r *http.Request, service string, pass []string, until time.Time, still func() error) {
	_, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	u := &user{pass, secret.Of(strings.TrimSpace(token)), until, still}
	kept := header.Keep(r.Header, u.passes(false))
	x := o.engine.begin(o.hop, w, r, service)
	defer x.end()
	x.caller(o.identity.ID)
	header.RemoveProtected(r.Header)
	maps.Copy(r.Header, kept)
	x.user = u
	if !x.resolve() || !x.decide() {
		return
	}
	if x.target.Import() {
		u.pass = nil
	}
	header.RemoveForwarding(r.Header)
	header.RemoveCredentials(r.Header, u.token.Reveal(), u.passes(false)...)
	r.URL.RawQuery = header.RemoveQueryCredentials(r.URL.RawQuery, u.token.Reveal(), u.passes(true)...)
	if !x.target.Import() { // who our users are is no other domain's business
		if host, _, err := net.SplitHostPort(r.RemoteAddr); err == nil {
			r.Header["X-Forwarded-For"] = []string{host}
		}
		r.Header["X-Forwarded-Proto"] = []string{"http"}
		if r.TLS != nil {
			r.Header["X-Forwarded-Proto"] = []string{"https"}
		}
	}
	x.forward(o.identity, o.place, nil)
}

// toUser takes out of an answer what its user may not be told: cookies are exchanged only
// with services that see the user's.
func (x *exchange) toUser(h http.Header) {
	if x.user == nil || slices.ContainsFunc(x.user.pass, func(name string) bool { return strings.EqualFold(name, "Cookie") }) {
		return
	}
	delete(h, "Set-Cookie")
	delete(h, "Set-Cookie2")
}

// Refuse answers r with a problem, and records it. detail goes to our own log only.
func (o *Outbound) Refuse(w http.ResponseWriter, r *http.Request, service string, p problem.Problem, detail string) {
	x := o.engine.begin(o.hop, w, r, service)
	defer x.end()
	x.caller(o.identity.ID)
	x.refuseWith(p, detail)
}

// Backend is an own service on this host, for which a sidecar answers.
type Backend struct {
	Identity
	Address string // host:port where the application listens, or unix: and the path of its socket
	Attest  Attest // asked of each connection before anything is sent; nil: not asked

	Monitor Monitor         // nil: nobody wants to know
	Open    context.Context // done: it takes no more requests, and those under way are cut; nil: it always does
}

// Monitor is told of each request that the application is given: when it begins, and how
// it ends. With an error the application could not be reached or gave no answer; with
// neither a status nor an error it is not to blame for what was wrong. Its methods are
// called concurrently.
type Monitor interface {
	Begin()
	End(status int, err error)
}

// ServeInbound serves a sidecar's mTLS door until ctx is done, then drains: for members of the
// own domain only (I6), SNI names the service. backend finds it by service name. ServeInbound owns ln.
func (e *Engine) ServeInbound(ctx context.Context, ln net.Listener, backend func(service string) (Backend, bool)) error {
	authz := peer.MemberOf(e.cfg.TrustDomain)
	config := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			b, ok := backend(hello.ServerName)
			if !ok {
				return nil, fmt.Errorf("no service %q on this host", hello.ServerName)
			}
			return peer.ServerTLS(b.SVID, e.cfg.Bundles, authz, alpn...), nil
		},
	}
	return e.serveTLS(ctx, &listener{name: "sidecar.inbound", ln: ln, identity: e.cfg.AdminIdentity, administration: e.cfg.Administration}, config, authz, func(w http.ResponseWriter, r *http.Request) {
		x := e.begin("inbound", w, r, r.Host)
		defer x.end()
		d, ok := x.downstream()
		if !ok || !x.meshCaller(d) {
			return
		}
		if !x.resolve() {
			return
		}
		b, ok := backend(d.serverName)
		if !ok || x.target.Name != d.serverName {
			x.refuse(refusal.UnknownService, "Host is not the service this connection was opened for.", "Host "+r.Host+", SNI "+d.serverName)
			return
		}
		if b.Open != nil && b.Open.Err() != nil {
			x.refuse(refusal.UpstreamUnreachable, "This instance takes no more requests: nothing was sent.", "it is drained")
			return
		}
		switch {
		case !x.decide():
		case x.tcp:
			x.toStream(b)
		default:
			x.toApplication(b, d)
		}
	})
}

// errNoShift goes to nobody: a TLS alert has no text.
var errNoShift = errors.New("this process is drained")

// ServeGateway serves an east-west gateway's mTLS door until ctx is done, then drains: for
// members of the own domain and for the gateways that agreements name. While the engine is
// drained it refuses handshakes, so that peers go elsewhere and find out when it is back;
// administrators', if they are served, it does not.
// ServeGateway owns ln.
func (e *Engine) ServeGateway(ctx context.Context, ln net.Listener, identity Identity) error {
	authz := func(id spiffeid.ID) error {
		v := e.current.Load()
		if v != nil && (id.MemberOf(e.cfg.TrustDomain) || v.Tables.IsPeerGateway(id)) {
			return nil
		}
		return fmt.Errorf("%s is neither of this domain nor a gateway that an agreement names", id)
	}
	self := header.Hop{TrustDomain: e.cfg.TrustDomain.Name(), Datacenter: e.cfg.Datacenter, Name: e.cfg.Process}
	config := peer.ServerTLS(identity.SVID, e.cfg.Bundles, authz, alpn...)
	l := &listener{name: "eastWest", id: identity.ID.String(), ln: ln, shifts: true, identity: identity, administration: e.cfg.Administration}
	return e.serveTLS(ctx, l, config, authz, func(w http.ResponseWriter, r *http.Request) {
		if e.Drained() != nil && r.ProtoMajor == 1 {
			w.Header().Set("Connection", "close")
		}
		x := e.begin("gateway", w, r, r.Host)
		defer x.end()
		d, ok := x.downstream()
		if !ok || !x.meshCaller(d) {
			return
		}
		if header.Loops(x.via, self) {
			x.refuse(refusal.Loop, "The request has passed this place before, or too many gateways.", "via "+x.record.via)
			return
		}
		from := catalog.Place{
			Datacenter:     e.cfg.Datacenter,
			Role:           catalog.Gateway,
			FromOwnGateway: x.view.Tables.IsOwnGateway(d.id),
			FromPeer:       !d.id.MemberOf(e.cfg.TrustDomain),
		}
		if x.resolve() && x.decide() {
			x.forward(identity, from, append(x.via, self))
		}
	})
}

// downstream returns the verified peer of the request's connection.
func (x *exchange) downstream() (*downstream, bool) {
	d, _ := x.r.Context().Value(downstreamKey{}).(*downstream)
	if d == nil || x.view == nil {
		x.refuse(refusal.NotReady, "This process does not know its domain yet.", "")
		return nil, false
	}
	x.record.peer = d.id.String()
	return d, true
}

// meshCaller establishes the caller of a request that came over mTLS, and removes
// what its peer may not say. A gateway speaks for others and is never a caller; one
// of another domain speaks for callers of that domain only. Everybody else is the
// caller himself, whatever he writes.
func (x *exchange) meshCaller(d *downstream) bool {
	h := x.r.Header
	tables, own := x.view.Tables, x.engine.cfg.TrustDomain
	ownGateway := tables.IsOwnGateway(d.id)
	if !ownGateway && d.id.MemberOf(own) {
		x.caller(d.id)
		header.RemoveProtected(h, header.TimeoutMS, header.Attempt, header.Tried)
		if reserved(d.id) {
			x.refuse(refusal.CallerUnknown, "This identity calls no services.", "reserved path")
			return false
		}
		return x.hopHeaders()
	}
	if !ownGateway && !tables.IsPeerGateway(d.id) { // the agreement changed since the connection was made
		x.refuse(refusal.GatewayNotAgreed, "This gateway is not part of an agreement.", "")
		return false
	}
	values := h[header.Caller]
	if len(values) != 1 {
		x.refuse(refusal.CallerUnknown, "A gateway must say for whom it calls.", fmt.Sprintf("%d values of %s", len(values), header.Caller))
		return false
	}
	id, err := spiffeid.FromString(values[0])
	if err != nil || id.Path() == "" || reserved(id) {
		x.refuse(refusal.CallerUnknown, header.Caller+" is not the SPIFFE ID of a workload.", values[0])
		return false
	}
	if !ownGateway && !id.MemberOf(d.id.TrustDomain()) {
		x.refuse(refusal.CallerUnknown, "A gateway speaks for callers of its own domain only.", "it named "+id.String())
		return false
	}
	x.caller(id)
	x.via, err = header.ParseVia(h[header.Via])
	if err != nil {
		x.refuse(refusal.BadRequest, header.Via+" cannot be read.", err.Error())
		return false
	}
	x.record.via = header.FormatVia(x.via)
	header.RemoveProtected(h, header.TimeoutMS, header.Attempt)
	return x.hopHeaders()
}

// reserved are identities of the mesh itself (members, agents, gateways).
func reserved(id spiffeid.ID) bool { return strings.HasPrefix(id.Path(), "/entente/") }
