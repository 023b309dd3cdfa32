package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/internal/dataplaneapi"
)

const defaultGatewaySocket = "/var/lib/entente/gateway/admin.sock"

// maxStatusSize bounds what the answer of a gateway may be, in bytes.
const maxStatusSize = 16 << 20

// gatewayFlags are the flags of every verb that talks to a gateway.
type gatewayFlags struct {
	socket string
	json   bool
	server string
	as     identityFlags

	what, listener string // which process it is instead, and which of its addresses; empty: a gateway
}

// process has the flags be for another process than a gateway. To be called before register.
func (f *gatewayFlags) process(what, listener string) { f.what, f.listener = what, listener }

func (f *gatewayFlags) kind() string { return cmp.Or(f.what, "gateway") }

func (f *gatewayFlags) register(c *cobra.Command) {
	c.Flags().StringVar(&f.server, "server", "", "address of the "+f.kind()+" ("+cmp.Or(f.listener, "eastWest.listen")+"), HOST:PORT, instead of --socket; authorized by the SVID's roles")
	f.as.register(c)
	socket := defaultGatewaySocket
	if f.what != "" {
		socket = defaultAgentSocket
	}
	c.Flags().StringVar(&f.socket, "socket", socket, "admin socket of the "+f.kind()+" of this host")
	c.Flags().BoolVar(&f.json, "json", false, "print JSON")
}

// call dials the gateway and runs do with its client.
func (f *gatewayFlags) call(ctx context.Context, do func(ententev1.DataPlaneClient) error) error {
	conn, err := f.dial(ctx, grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxStatusSize)))
	if err != nil {
		return err
	}
	defer conn.Close()
	return do(ententev1.NewDataPlaneClient(conn))
}

func (f *gatewayFlags) dial(ctx context.Context, options ...grpc.DialOption) (*grpc.ClientConn, error) {
	if f.server == "" {
		return dialSocket(f.socket, f.kind(), " from elsewhere: --server", options...)
	}
	if err := ca.CheckAddress(f.server); err != nil {
		return nil, fmt.Errorf("--server: %w", err)
	}
	svid, bundle, err := f.as.read(ctx)
	if err != nil {
		return nil, err
	}
	conn, err := dataplaneapi.Administrator{SVID: svid, Bundles: bundle, Domain: svid.ID.TrustDomain()}.Dial(ctx, f.server, options...)
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "cannot reach the %s at %s: %v; is --server its %s, is it of %s, and does its release serve administrators?", f.kind(), f.server, err, cmp.Or(f.listener, "eastWest.listen"), svid.ID.TrustDomain())
	}
	return conn, nil
}

func gatewayStatusCommand() *cobra.Command {
	var flags gatewayFlags
	c := &cobra.Command{
		Use:   "status [SERVICE]",
		Short: "Show the state of a gateway, and how it sees its domain",
		Long: `Ask a gateway at its admin socket, as root or the gateway's user, or with --server from
elsewhere, as an SVID with a role: its identity, the CA
node that it follows, bundles, listeners, and where it would send requests for each
service, or for one.`,
		Example: "  entente gateway status\n  entente gateway status accounts.banking.example --json",
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usageError{c, errors.New("name at most one service")}
			}
			request := &ententev1.DataPlaneStatusRequest{Service: strings.Join(args, "")}
			return flags.call(c.Context(), func(client ententev1.DataPlaneClient) error {
				s, err := gatewayStatus(c.Context(), client, request)
				if err != nil {
					return err
				}
				if flags.json {
					return printJSON(c.OutOrStdout(), s)
				}
				return printDataPlaneStatus(c.OutOrStdout(), s, time.Now())
			})
		},
	}
	flags.register(c)
	return c
}

// answerTime is how long a gateway may take to answer a call.
const answerTime = 20 * time.Second

func gatewayStatus(ctx context.Context, client ententev1.DataPlaneClient, request *ententev1.DataPlaneStatusRequest) (*ententev1.DataPlaneStatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	return client.Status(ctx, request)
}

func printDataPlaneStatus(w io.Writer, s *ententev1.DataPlaneStatusResponse, now time.Time) error {
	table := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintf(table, "%s\t%s of %s, %s\n", strings.ToUpper(s.GetKind()), s.GetName(), s.GetTrustDomain(), s.GetDatacenter())
	fmt.Fprintf(table, "BUILD\t%s\n", strings.TrimSpace(s.GetBuild().GetVersion()+" "+s.GetBuild().GetCommit()))
	state := "ready"
	if !s.GetReady() {
		state = "NOT READY: " + s.GetNotReady()
	}
	if d := s.GetDrained(); d != nil {
		fmt.Fprintf(table, "DRAINED\t%s ago by %s: %s\n", lasting(now.Sub(d.GetSince().AsTime())), d.GetWho(), cmp.Or(d.GetReason(), "no reason given"))
	}
	fmt.Fprintf(table, "STATE\t%s; up %s\n", state, lasting(now.Sub(s.GetStarted().AsTime())))
	for _, warning := range s.GetWarnings() {
		fmt.Fprintf(table, "WARNING\t%s\n", warning)
	}
	for _, svid := range s.GetSvids() {
		end := "NO SVID"
		if svid.GetNotAfter() != nil {
			end = "expires in " + lasting(svid.GetNotAfter().AsTime().Sub(now))
		}
		fmt.Fprintf(table, "IDENTITY\t%s, %s\n", svid.GetSpiffeId(), end)
	}
	printFollowedCA(table, s.GetCa(), now)
	fmt.Fprintf(table, "TRAFFIC\t%d connections, %d requests under way\n", s.GetConnections(), s.GetRequests())

	fmt.Fprintln(table, "\nLISTENER\tADDRESS\tCONNECTIONS\tSPIFFE ID")
	for _, l := range s.GetListeners() {
		fmt.Fprintf(table, "%s\t%s\t%d\t%s\n", l.GetName(), cmp.Or(l.GetAddress(), "-"), l.GetConnections(), cmp.Or(l.GetSpiffeId(), "-"))
	}
	fmt.Fprintln(table, "\nBUNDLE\tX.509 AUTHORITIES\tUNCHANGED FOR\tFIRST EXPIRES IN")
	for _, b := range s.GetBundles() {
		first := "-"
		if b.GetFirstExpiry() != nil {
			first = lasting(b.GetFirstExpiry().AsTime().Sub(now))
		}
		unchanged := "-"
		if b.GetSince() != nil {
			unchanged = lasting(now.Sub(b.GetSince().AsTime()))
		}
		fmt.Fprintf(table, "%s\t%d\t%s\t%s\n", b.GetTrustDomain(), b.GetX509Authorities(), unchanged, first)
	}
	fmt.Fprintln(table, "\nSERVICE\tENDPOINT\tDATACENTER\tADDRESS\tSTATE")
	for _, service := range s.GetServices() {
		printServiceView(table, service)
	}
	if n := s.GetServicesLeftOut(); n > 0 {
		fmt.Fprintf(table, "and %d more\tname a service to see it\n", n)
	}
	return table.Flush()
}

func printFollowedCA(w io.Writer, f *ententev1.FollowedCA, now time.Time) {
	node := f.GetNode() + " at " + f.GetAddress()
	if f.GetNode() == "" {
		node = "NONE, using the last state"
	}
	fmt.Fprintf(w, "CA NODE\t%s; revision %s, feature level %d\n", node, ca.Revision(f.GetRevision()), f.GetFeatureLevel())
	if len(f.GetCompared()) > 0 {
		fmt.Fprintf(w, "COMPARED\twith %s\n", strings.Join(f.GetCompared(), ", "))
	}
	if f.GetDoubt() != "" {
		fmt.Fprintf(w, "DOUBT\t%s contradicts it: %s\n", f.GetDoubtBy(), f.GetDoubt())
	}
	for _, a := range f.GetAvoided() {
		fmt.Fprintf(w, "AVOIDED\t%s for %s: %s (%s)\n", a.GetNode(), lasting(a.GetUntil().AsTime().Sub(now)), a.GetWhy(), strings.Join(a.GetBy(), ", "))
	}
	if len(f.GetTooOld()) > 0 {
		fmt.Fprintf(w, "TOO OLD\tnot enforced here: %s\n", strings.Join(f.GetTooOld(), "; "))
	}
	if len(f.GetSkipped()) > 0 {
		fmt.Fprintf(w, "SKIPPED\tnot known here: %s\n", strings.Join(f.GetSkipped(), "; "))
	}
}

func printServiceView(w io.Writer, s *ententev1.ServiceView) {
	if len(s.GetEndpoints()) == 0 {
		fmt.Fprintf(w, "%s\t-\t-\t-\tNONE\n", s.GetName())
	}
	name := s.GetName()
	for _, e := range s.GetEndpoints() {
		state := "healthy"
		if !e.GetHealthy() {
			state = "UNHEALTHY"
		}
		if e.GetStale() {
			state += ", stale"
		}
		if e.GetEjected() {
			state += ", EJECTED: unreachable"
		}
		endpoint := e.GetName()
		if e.GetId() != "" {
			endpoint += "/" + e.GetId()
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", name, endpoint, e.GetDatacenter(), e.GetAddress(), state)
		name = ""
	}
	if n := s.GetEndpointsLeftOut(); n > 0 {
		fmt.Fprintf(w, "\tand %d more\n", n)
	}
}

// lasting is a duration for people, in its two largest units: 5d4h, 3m10s.
func lasting(d time.Duration) string {
	sign := ""
	if d < 0 {
		sign, d = "-", -d
	}
	days, hours, minutes, seconds := int(d.Hours())/24, int(d.Hours())%24, int(d.Minutes())%60, int(d.Seconds())%60
	switch {
	case days > 0:
		return fmt.Sprintf("%s%dd%dh", sign, days, hours)
	case hours > 0:
		return fmt.Sprintf("%s%dh%dm", sign, hours, minutes)
	case minutes > 0:
		return fmt.Sprintf("%s%dm%ds", sign, minutes, seconds)
	}
	return fmt.Sprintf("%s%ds", sign, seconds)
}
