package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/client"
)

const defaultAdminSocket = "/var/lib/entente/ca/admin.sock"

// adminFlags are the flags of every verb that talks to a CA node: over its admin socket,
// or, with --server, over the network as an administrator.
type adminFlags struct {
	socket string
	json   bool
	remote remoteFlags
}

// remoteFlags say at which CA nodes, and as whom.
type remoteFlags struct {
	servers []string
	identityFlags
}

// identityFlags say as whom.
type identityFlags struct {
	identity    string
	workloadAPI string
	as          string
}

func (f *adminFlags) register(c *cobra.Command) {
	c.Flags().StringVar(&f.socket, "socket", defaultAdminSocket, "admin socket of a CA node of this domain")
	c.Flags().BoolVar(&f.json, "json", false, "print JSON")
	f.remote.register(c)
}

func (f *remoteFlags) register(c *cobra.Command) {
	f.identityFlags.register(c)
	c.Flags().StringSliceVar(&f.servers, "server", nil, "API address of a CA node, HOST:PORT, in the place of a socket: the SVID's roles count; repeatable")
}

func (f *identityFlags) register(c *cobra.Command) {
	c.Flags().StringVar(&f.identity, "identity", "", "with --server: directory with svid.0.pem, svid.0.key and bundle.0.pem, as fetch x509 --write makes it; default: the Workload API's SVID")
	c.Flags().StringVar(&f.workloadAPI, "workload-api", "", "with --server: Workload API's socket; default $"+socketVariable+" or "+defaultWorkloadAPI)
	c.Flags().StringVar(&f.as, "as", "", "with --server: which SPIFFE ID to show, if the Workload API has several")
}

// call dials a CA node and runs do with its client.
func (f *adminFlags) call(ctx context.Context, do func(ententev1.AdminClient) error) error {
	if len(f.remote.servers) > 0 {
		return f.remote.call(ctx, do)
	}
	conn, err := dialSocket(f.socket, "CA node", " from elsewhere: --server")
	if err != nil {
		return err
	}
	defer conn.Close()
	return do(ententev1.NewAdminClient(conn))
}

// dialSocket opens the admin socket of a process. what it is, and what else could be done, go
// into the error.
func dialSocket(socket, what, otherwise string, options ...grpc.DialOption) (*grpc.ClientConn, error) {
	// Dialled once to say what is wrong: gRPC would name its transport and no remedy.
	tried, err := net.DialTimeout("unix", socket, fetchTimeout)
	if err != nil {
		var call *os.SyscallError
		if errors.As(err, &call) {
			err = call.Err
		}
		return nil, status.Errorf(codes.Unavailable, "no %s answers at %s: %v; is it running on this host, is --socket right, and are you its user or root?%s", what, socket, err, otherwise)
	}
	tried.Close()
	conn, err := grpc.NewClient("unix:"+socket, append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", socket, err)
	}
	return conn, nil
}

func (f *remoteFlags) call(ctx context.Context, do func(ententev1.AdminClient) error) error {
	svid, bundle, err := f.read(ctx)
	if err != nil {
		return err
	}
	for _, server := range f.servers {
		if err := ca.CheckAddress(server); err != nil {
			return fmt.Errorf("--server: %w", err)
		}
	}
	c, err := client.New(client.Config{TrustDomain: svid.ID.TrustDomain(), Addresses: f.servers, SVID: svid, Bundles: bundle})
	if err != nil {
		return err
	}
	door, done, err := c.Admin(ctx)
	if err != nil {
		return status.Errorf(codes.Unavailable, "%v; is --server the API address, and is %s of the same trust domain?", err, svid.ID)
	}
	defer done()
	return do(door)
}

// read takes the administrator's SVID, and the bundle that CA nodes are verified with.
func (f *identityFlags) read(ctx context.Context) (*x509svid.SVID, *x509bundle.Bundle, error) {
	if f.identity == "" {
		return f.fetch(ctx)
	}
	at := func(name string) string { return filepath.Join(f.identity, name) }
	svid, err := x509svid.Load(at("svid.0.pem"), at("svid.0.key"))
	if err != nil {
		return nil, nil, fmt.Errorf("read the SVID in %s: %w", f.identity, err)
	}
	bundle, err := x509bundle.Load(svid.ID.TrustDomain(), at("bundle.0.pem"))
	if err != nil {
		return nil, nil, fmt.Errorf("read the bundle in %s: %w", f.identity, err)
	}
	return svid, bundle, nil
}

// fetchTimeout is how long the Workload API has to answer.
const fetchTimeout = 5 * time.Second

func (f *identityFlags) fetch(ctx context.Context) (*x509svid.SVID, *x509bundle.Bundle, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	socket := cmp.Or(f.workloadAPI, os.Getenv(socketVariable), defaultWorkloadAPI)
	if !strings.Contains(socket, ":") {
		socket = "unix://" + socket
	}
	got, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr(socket))
	if err != nil {
		return nil, nil, status.Errorf(codes.Unavailable, "no SVID from the Workload API at %s: %v; or give --identity", socket, err)
	}
	var ids []string
	for _, svid := range got.SVIDs {
		if ids = append(ids, svid.ID.String()); f.as != svid.ID.String() && (f.as != "" || len(got.SVIDs) > 1) {
			continue
		}
		bundle, err := got.Bundles.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
		return svid, bundle, err
	}
	return nil, nil, fmt.Errorf("this process has %s: choose one with --as", strings.Join(ids, ", "))
}

// printJSON writes a message with stable, camel-case names.
func printJSON(w io.Writer, m proto.Message) error {
	raw, err := protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return err
	}
	return indentJSON(w, raw)
}

// indentJSON re-indents: protojson varies its white space on purpose.
func indentJSON(w io.Writer, raw []byte) error {
	var value any
	if err := json.Unmarshal(raw, &value); err != nil {
		return err
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(value)
}
