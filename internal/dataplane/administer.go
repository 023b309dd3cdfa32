package dataplane

import (
	"crypto/tls"
	"errors"
	"net"
	"slices"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/internal/admission"
	"github.com/entente-mesh/entente/internal/peer"
)

// AdminALPN is the protocol by which administrators come to an mTLS door. Who offers it is
// served nothing else, and who does not never gets there.
const AdminALPN = "entente-admin/1"

// Administration serves administrators at mTLS doors, next to their traffic. Its methods are
// called concurrently.
type Administration interface {
	// Hello says why nobody from an address may begin a handshake now; nil if he may. It is
	// asked before anything is computed for him.
	Hello(source string) error
	// Seat gives a verified member of the own domain a place, and says who may stay in it.
	Seat(id spiffeid.ID) (places *admission.Places, stays peer.Authorize)
	// Take takes over a connection; false: it does not.
	Take(*AdminConn) bool
}

// AdminConn is a connection with an administrator, who has shaken hands.
type AdminConn struct {
	*tls.Conn
	ID      spiffeid.ID
	untrack func()
	once    sync.Once
}

// Close is part of net.Conn. It says no good-bye: who does not read could hold that up.
func (c *AdminConn) Close() error {
	c.once.Do(c.untrack)
	return c.NetConn().Close()
}

var (
	errTaken          = errors.New("the connection is an administrator's")
	errNoAdmin        = errors.New("administrators are not served here")
	errBusy           = errors.New("administrators are not served while many connections are open")
	errManyAdmins     = errors.New("too many administrators' connections are open")
	errAdminIsStopped = errors.New("administrators are served no more")
)

// doorTLS is what a door says to each client: config to those of traffic, unless the
// engine is drained and the door is to be, and to an administrator what is his.
func (e *Engine) doorTLS(config *tls.Config, l *listener, busy func() bool) *tls.Config {
	var admin *tls.Config
	if l.administration != nil {
		admin = peer.ServerTLS(l.identity.SVID, e.cfg.Bundles, peer.MemberOf(e.cfg.TrustDomain), AdminALPN)
	}
	door, each := config.Clone(), config.GetConfigForClient
	door.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		switch {
		case !slices.Contains(hello.SupportedProtos, AdminALPN):
		case admin == nil:
			return nil, errNoAdmin
		case busy():
			return nil, errBusy
		default:
			return admin, l.administration.Hello(admission.Source(hello.Conn.RemoteAddr()))
		}
		switch {
		case l.shifts && e.Drained() != nil:
			return nil, errNoShift
		case each != nil:
			return each(hello)
		}
		return nil, nil
	}
	return door
}

// administer hands over a connection that has shaken hands as an administrator's. It
// always returns an error: for traffic there is no connection.
func (e *Engine) administer(l *listener, conn *tls.Conn, raw net.Conn, id spiffeid.ID) error {
	places, stays := l.administration.Seat(id)
	if !raw.(*admission.Conn).SeatAt(places, id.String()) {
		_ = raw.Close()
		e.log.Debug("administrator's connection refused: too many are open", "peer_address", raw.RemoteAddr().String(), "peer", id.String())
		return errManyAdmins
	}
	state := conn.ConnectionState()
	own := &AdminConn{Conn: conn, ID: id}
	own.untrack = e.registry.Track(conn, state, peer.Recheck(state, e.cfg.Bundles, stays))
	if !l.administration.Take(own) {
		_ = own.Close()
		return errAdminIsStopped
	}
	return errTaken
}
