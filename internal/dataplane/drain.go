package dataplane

import (
	"context"
	"net"
	"net/http"
	"sync"
	"time"
)

// freshPatience is how long a door that closes waits for the first requests of
// connections that it has taken.
const freshPatience = time.Second

// fresh are a server's connections whose first request has not reached the handler.
// http.Server.Shutdown drops what such a connection brings, although its caller has
// done nothing wrong; on any other it may have to send again.
type fresh struct {
	mu   sync.Mutex
	open map[net.Conn]struct{}
	none *sync.Cond
}

type freshKey struct{}

// watch has the server's fresh connections known. To be called before it serves.
func watch(server *http.Server) *fresh {
	f := &fresh{open: map[net.Conn]struct{}{}}
	f.none = sync.NewCond(&f.mu)
	state, connContext, handler := server.ConnState, server.ConnContext, server.Handler
	server.ConnState = func(conn net.Conn, s http.ConnState) {
		switch s {
		case http.StateNew:
			f.mu.Lock()
			f.open[conn] = struct{}{}
			f.mu.Unlock()
		case http.StateClosed:
			f.begun(conn)
		}
		if state != nil {
			state(conn, s)
		}
	}
	server.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		if connContext != nil {
			ctx = connContext(ctx, conn)
		}
		return context.WithValue(ctx, freshKey{}, sync.OnceFunc(func() { f.begun(conn) }))
	}
	server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Context().Value(freshKey{}).(func())()
		handler.ServeHTTP(w, r)
	})
	return f
}

func (f *fresh) begun(conn net.Conn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.open, conn)
	if len(f.open) == 0 {
		f.none.Broadcast()
	}
}

// wait returns when there is no fresh connection, or after freshPatience.
func (f *fresh) wait() {
	late := false
	timer := time.AfterFunc(freshPatience, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		late = true
		f.none.Broadcast()
	})
	defer timer.Stop()
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.open) > 0 && !late {
		f.none.Wait()
	}
}
