package dataplaneapi

import (
	"context"
	"net"
	"net/http"

	"google.golang.org/grpc"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/internal/localpeer"
)

// LocalHandler serves the operators of the host by a server of HTTP/2 that listens on a unix
// socket of mode 0600 and answers other requests, too. connection gives the connection of a
// request.
func (s *Server) LocalHandler(connection func(context.Context) net.Conn) http.Handler {
	server := grpc.NewServer(grpc.UnaryInterceptor(s.unary), grpc.StreamInterceptor(s.stream), grpc.MaxRecvMsgSize(maxMessage))
	ententev1.RegisterDataPlaneServer(server, door{server: s})
	calls := make(chan struct{}, maxCalls) // slots
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		socket, ok := connection(r.Context()).(*net.UnixConn)
		if !ok {
			http.Error(w, "the caller did not come by the socket", http.StatusForbidden)
			return
		}
		select {
		case calls <- struct{}{}:
			defer func() { <-calls }()
		default:
			http.Error(w, "too many administrative calls are under way at this process; try again when they have ended", http.StatusTooManyRequests)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), callLimit)
		defer cancel()
		server.ServeHTTP(w, r.WithContext(context.WithValue(ctx, operatorKey{}, localpeer.Of(socket))))
	})
}

type operatorKey struct{}
