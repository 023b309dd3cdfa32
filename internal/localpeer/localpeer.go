// Package localpeer says who is at the other end of a unix socket: gRPC credentials for a
// listener that only the users of its host can open, as the mode of its socket allows.
package localpeer

import (
	"context"
	"errors"
	"net"

	"google.golang.org/grpc/credentials"
)

// Credentials mark connections over a unix socket with an Info. They are a server's, and
// refuse any other kind of connection.
type Credentials struct{}

// Info is the AuthInfo of such a connection.
type Info struct {
	credentials.CommonAuthInfo
	User string // who opened it, for logs
}

// AuthType is part of credentials.AuthInfo.
func (Info) AuthType() string { return "local" }

// ServerHandshake is part of credentials.TransportCredentials, as are those below.
func (Credentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	socket, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, nil, errors.New("the connection is not of a unix socket")
	}
	return conn, Of(socket), nil
}

// Of is the Info of a connection.
func Of(socket *net.UnixConn) Info {
	return Info{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, userOf(socket)}
}

// ClientHandshake fails.
func (Credentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("not a client")
}

// Info describes the credentials.
func (Credentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "local"}
}

// Clone returns the credentials themselves: they hold nothing.
func (l Credentials) Clone() credentials.TransportCredentials { return l }

// OverrideServerName does nothing.
func (Credentials) OverrideServerName(string) error { return nil }
